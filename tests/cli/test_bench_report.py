"""Results of benchmarks as tables, plots and a page, from files with figures worked by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ume_models.cli.bench.plots import MISSING, curves, speed_ups
from ume_models.cli.bench.reading import read_results
from ume_models.cli.bench.report import keep_results, kept_name
from ume_models.cli.bench.report import report as run
from ume_models.cli.bench.tables import tables
from ume_models.cli.terminal import set_verbosity
from ume_models.errors import DataError

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def loud() -> None:
    set_verbosity(verbose=False, quiet=False)


def entry(group: str, engine: str, role: str, seconds: float, **info: Any) -> dict[str, Any]:
    about = {"section": "rollout", "samples": 1, **info, "engine": engine, "role": role}
    stats = {"min": seconds, "median": 1.5 * seconds, "max": 2 * seconds, "rounds": 3, "mean": 0.0}
    return {"name": f"test[{engine}]", "group": group, "extra_info": about, "stats": stats}


def rollouts() -> list[dict[str, Any]]:
    """Four batch sizes and three K; the reference takes one sample at a time."""
    made = []
    for k in (0, 4, 8):
        for batch in (1, 4, 16):
            group = f"K = {k}, batch {batch}"
            common = {"latent_steps": k, "floor_seconds": 0.001 * (k + 1)}
            ours = 0.002 * (k + 1) * batch**0.5
            made.append(entry(group, "fast", "ours", ours, batch=batch, samples=batch, **common))
            made.append(entry(group, "loop", "reference", 0.01 * (k + 2), batch=1, **common))
            made.append(
                entry(group, "other", "rival", 1.5 * ours, batch=batch, samples=batch, **common)
            )
    return made


def write(path: Path, entries: list[dict[str, Any]], **changes: Any) -> Path:
    content = {
        "datetime": "2026-11-21T10:00:00+00:00",
        "machine_info": {
            "node": "secret-host",
            "ume": {"cpu": "Some CPU", "cores": 2, "threads": 2, "gpu": None},
            "ume_versions": {"torch": "2.13.0", "triton": None},
        },
        "commit_info": {"id": "abc123", "author": "secret-user"},
        "benchmarks": entries,
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    asked = [
        entry("rank", "ours", "ours", 2.0, section="ranking", samples=1000, bar=5.0),
        # a hundred queries in a second: five times as long per query
        entry("rank", "numpy", "reference", 1.0, section="ranking", samples=100),
        entry("start", "ours", "ours", 9.0, section="start-up", bar_seconds=3, counted_seconds=3.5),
        # twenty calls in a round
        entry("op", "kernel | 1", "ours", 0.02, section="operation", calls=20,
              energy_joules=0.05, nvml={"sm_mhz": 1980.0, "power_w": 501.2}),
    ]  # fmt: skip
    return write(tmp_path / "out.json", [*rollouts(), *asked])


def test_tables_compare_per_sample_and_per_call(results: Path) -> None:
    by_title = {table.title: table for table in tables(read_results(results))}
    asked = by_title["What is asked for"].rows
    assert asked == (
        ("rank: ours", "≥ 5× numpy", "5.00×", "met"),
        ("start: ours", "< 3 s", "3.5 s", "MISSED"),
    )
    ranking = by_title["Ranking"]
    column = ranking.columns.index("ours is faster by")
    assert [row[column] for row in ranking.rows] == ["–", "5.00×"]
    assert ranking.strong == {0}
    rollout = by_title["Per rollout"]
    # K = 4, batch 16: ours 0.002·5·4/16 s a sample, the loop 0.06 s
    at = next(n for n, row in enumerate(rollout.rows) if row[0] == "K = 4, batch 16")
    cells = dict(zip(rollout.columns, rollout.rows[at], strict=True))
    assert (cells["best round"], cells["median"], cells["rounds"]) == ("40.00 ms", "60.00 ms", "3")
    assert cells["samples/s"] == "400"
    assert cells["of the roofline"] == "12%"  # 0.005 of 0.04 s
    loop, other = rollout.rows[at + 1], rollout.rows[at + 2]
    at = rollout.columns.index("ours is faster by")
    assert (loop[1], loop[at]) == ("loop", "24.00×")
    assert (other[1], other[at]) == ("other", "1.50×")
    [operation] = by_title["Per operation"].rows
    assert operation[2:5] == ("1.00 ms", "1.50 ms", "3")
    # Only the best was noted by the process itself.
    [start] = by_title["Start-up: a fresh process to its first embedding"].rows
    assert start[2:5] == ("3.5 s", "–", "3")
    assert operation[-2:] == ("50 mJ", "1980 MHz, 501 W")


def test_several_engines_of_ours_get_a_ratio_each(tmp_path: Path) -> None:
    entries = [
        entry("g", "a", "ours", 1.0), entry("g", "b", "ours", 4.0), entry("g", "c", "rival", 2.0)
    ]  # fmt: skip
    [table] = tables(read_results(write(tmp_path / "x.json", entries)))
    assert table.rows[2][table.columns.index("ours is faster by")] == "2.00× a, 0.50× b"
    [ratio] = speed_ups(read_results(tmp_path / "x.json").figures)
    assert (ratio.reference, ratio.rival) == (None, 2.0), "against our best"


def test_an_ablation_is_shown_but_is_no_rival(tmp_path: Path) -> None:
    entries = [
        entry("g", "no graph", "ablation", 1.5), entry("g", "ours", "ours", 1.0),
        entry("g", "other", "rival", 4.0), entry("h", "ours", "ours", 1.0),
        entry("h", "no graph", "ablation", 3.0),
    ]  # fmt: skip
    results = read_results(write(tmp_path / "x.json", entries))
    [table] = tables(results)
    at = table.columns.index("ours is faster by")
    assert [(row[1], row[at]) for row in table.rows] == [
        ("ours", "–"), ("other", "4.00×"), ("no graph (ablation)", "1.50×"),
        ("ours", "–"), ("no graph (ablation)", "3.00×"),
    ]  # fmt: skip
    assert table.strong == {0, 3}
    [ratio] = speed_ups(results.figures)
    assert (ratio.group, ratio.rival) == ("g", 4.0), "the slower engine that is a rival"


def test_rounds_are_read_from_what_was_noted(tmp_path: Path) -> None:
    older = entry("g", "older", "rival", 2.0)
    del older["stats"]["rounds"]
    entries = [entry("g", "ours", "ours", 1.0, rounds=2, warm_up=0), older]
    own = entry("s", "e", "ours", 9.0, counted_seconds=3.0, counted_median=4.0)
    results = read_results(write(tmp_path / "x.json", [*entries, own]))
    assert [figure.rounds for figure in results.figures] == [2, None, 3]
    assert [figure.median for figure in results.figures] == [1.5, 3.0, 4.0]
    [table] = tables(results)
    assert [row[4] for row in table.rows] == ["2", "–", "3"]


def test_curves_hold_the_other_number_at_its_ends(results: Path) -> None:
    figures = read_results(results).sections()["rollout"]
    lines = curves(figures, lambda f: f.batch, lambda f: f.steps)
    assert {(line.engine, line.held) for line in lines} == {
        (engine, k) for engine in ("fast", "loop", "other") for k in (0, 8)
    }
    [ours] = [line for line in lines if (line.engine, line.held) == ("fast", 8)]
    assert [at for at, _ in ours.points] == [1, 4, 16]
    assert [figure.rate for _, figure in ours.points] == pytest.approx(
        [b / (0.018 * b**0.5) for b in (1, 4, 16)]
    )
    assert curves(figures[:1], lambda f: f.batch, lambda f: f.steps) == []


def test_the_report_has_tables_plots_and_a_page(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run([results], tmp_path / "a")
    said = capsys.readouterr()
    assert "| rank: ours | ≥ 5× numpy | 5.00× | met |" in said.out
    assert r"**kernel \| 1**" in said.out, "cells do not break the table"
    assert "Best round; Some CPU, 2 cores, 2 threads, torch 2.13.0, 2026-11-21." in said.out
    names = {"speed-up", "throughput-rollout", "latency-rollout", "roofline"}
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {"report.md", "report.html"} | {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert (tmp_path / "a" / "report.md").read_text() == said.out
    for name in names:
        assert "![" in said.out and f"({name}.png)" in said.out
        assert (tmp_path / "a" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "a" / "throughput-rollout.svg").read_text()
    for text in ("samples per second", "fast, K = 8", "loop, K = 0"):
        assert text in drawn
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing outside of the page"
    assert 'class="missed"' in page
    run([results], tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_texts_are_escaped_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "x.json", [entry("<script>", "e", "ours", 1.0)])
    run([path], tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


def test_without_matplotlib_there_are_tables_and_a_remedy(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run([results], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.html"}
    said = capsys.readouterr()
    assert "pip install matplotlib" in MISSING
    assert MISSING in said.err
    assert "Per rollout" in said.out
    run([results])  # nothing to draw, nothing to say
    assert "matplotlib" not in capsys.readouterr().err


def test_kept_results_tell_the_same_without_names(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([results], keep=tmp_path / "kept")
    before = capsys.readouterr().out
    [path] = (tmp_path / "kept").iterdir()
    assert path.name == "2026-11-21-some-cpu-2-cores.json"
    text = path.read_text()
    assert "secret" not in text
    assert json.loads(text)["commit"] == "abc123"
    run([path])
    assert capsys.readouterr().out == before
    assert read_results(path).kept == json.loads(text)
    gpu = {"cpu": "C", "cores": 4, "gpu": {"name": "NVIDIA H200"}}
    write(results, rollouts(), machine_info={"ume": gpu, "ume_versions": {}})
    assert kept_name(read_results(results)) == "2026-11-21-nvidia-h200.json"


def test_what_cannot_be_kept_is_refused(results: Path, tmp_path: Path) -> None:
    tried = write(tmp_path / "tried.json", [entry("g", "e", "ours", 1.0, tiny=True)])
    for parts, target, reason in (
        ([tried], tmp_path / "kept", "nothing was measured"),
        ([results, results], tmp_path / "kept", "one by one"),
        ([results, results], tmp_path / "one.json", "name a folder"),
    ):
        with pytest.raises(DataError, match=reason):
            keep_results([read_results(part) for part in parts], target)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(DataError, match="nothing was measured"):
        run([tried], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such file"),
        ("{", "is not JSON"),
        ("{}", "holds no measured times"),
        ('{"benchmarks": []}', "no benchmark ran"),
        ('{"datetime": "2026", "benchmarks": [{"name": "x"}]}', "incomplete or damaged"),
        ("[]", "is empty"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"bad\.json: .*{reason}"):
        read_results(path)


@pytest.mark.parametrize(
    ("name", "section", "ratio"),
    [
        # ratios of the tables of docs/measure.md
        ("2026-11-21-epyc-zen4-2-cores.json", "Per input class", "3.62×"),
        ("2026-11-21-patching-epyc-zen4-2-cores.json", "Unmodified evaluation script", "5.30×"),
    ],
)
def test_files_kept_earlier_are_still_read(name: str, section: str, ratio: str) -> None:
    if not (KEPT / name).exists():
        pytest.skip("the files of measured machines are not in this copy")
    [table] = tables(read_results(KEPT / name))
    assert table.title == section
    assert any(ratio in cell for row in table.rows for cell in row)


def test_rounds_of_files_kept_earlier_are_shown() -> None:
    path = KEPT / "2026-11-21-evaluation-epyc-zen4-2-cores.json"
    if not path.exists():
        pytest.skip("the files of measured machines are not in this copy")
    [table] = [table for table in tables(read_results(path)) if "miniature" in table.title]
    rounds = table.columns.index("rounds")
    assert {row[1]: row[rounds] for row in table.rows} == {"ume eval": "3", "official style": "1"}
