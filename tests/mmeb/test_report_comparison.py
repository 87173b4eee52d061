"""Comparisons of two runs: the three forms agree, and significance is not told by colour alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ume_models.mmeb.agreement import CosineDistribution, RankAgreement
from ume_models.mmeb.compare import Comparison, Delta, Setting, TaskComparison, compare
from ume_models.mmeb.intervals import Interval
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.report import comparison as report
from ume_models.mmeb.report.remarks import comparison_remarks
from ume_models.mmeb.results import RunFolder, score_task
from ume_models.mmeb.summary import Missing

COSINES = CosineDistribution(100, 0.98762, 0.9912, 0.9995, 1 - 2e-7)
TASKS = {task.name: task for task in MMEB_V2}


def task(
    name: str,
    a: float,
    b: float,
    reach: float,
    p: float,
    *,
    moved: tuple[int, int] = (9, 3),
    same_data: bool | None = True,
) -> TaskComparison:
    known = TASKS[name]
    interval = Interval(b - a - reach, b - a + reach)
    return TaskComparison(
        task=name,
        modality=known.modality,
        group=known.group,
        metric=known.metric,
        queries=1000,
        score=Delta(a, b, b - a, interval, p / 3),
        p_adjusted=p,
        better=moved[0],
        worse=moved[1],
        ranks=RankAgreement(0.875, 0.9, -0.5),
        query_cosine=COSINES,
        candidate_cosine=None,
        same_data=same_data,
    )


MADE = Comparison(
    a="/runs/fast",
    b="/runs/slow_<b>",
    settings=[Setting("dtype", "bfloat16", "float32"), Setting("labels", "fixed", "legacy")],
    # Alphabetical, as ``compare`` has them; the report has the order of the benchmark.
    tasks=[
        task("CIRR", 0.50, 0.50, 0.02, 1.0, moved=(0, 0)),
        task("GQA", 0.40, 0.50, 0.04, 0.004),
        task("ImageNet-1K", 0.70, 0.66, 0.03, 0.03, same_data=False),
        task("ScienceQA", 0.60, 0.62, 0.05, 0.12, same_data=None),
    ],
    not_compared=[Missing("VATEX", "only one | has <it>")],
    overall=Delta(0.55, 0.57, 0.02, Interval(0.01, 0.03), 0.0002),
)
NOTHING = replace(MADE, tasks=[], overall=None, settings=[], not_compared=[])


def plain(renderable: Any, width: int = 110) -> str:
    console = Console(width=width, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def words_of(page: str) -> str:
    """The page's text, tags taken away; cells apart from each other."""
    page = re.sub(r"<wbr>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_three_forms_agree() -> None:
    shown, written = plain(report.comparison_table(MADE)), report.comparison_markdown(MADE)
    told = words_of(report.comparison_page(MADE))
    numbers = {
        "CIRR": ("50.0", "50.0", "0.0", "−2.0 … +2.0", "1.000"),
        "GQA": ("40.0", "50.0", "▲ +10.0", "+6.0 … +14.0", "0.004"),
        "ImageNet-1K": ("70.0", "66.0", "▼ −4.0", "−7.0 … −1.0", "0.030"),
        "ScienceQA": ("60.0", "62.0", "+2.0", "−3.0 … +7.0", "0.120"),
    }
    for name, cells in numbers.items():
        ranks = ("87.5", "90.0", "−0.500")
        assert f"| {' | '.join((name, *cells, *ranks))} |" in written
        assert re.search(rf"{name} +{' +'.join(map(re.escape, cells))}", shown)
        moved = "+0 −0" if name == "CIRR" else "+9 −3"
        assert " ".join((name, *cells, "1,000", moved, *ranks)) in told
    # Rows of groups: plain means of their tasks.
    assert "| **Visual question answering** | **50.0** | **56.0** | **+6.0** |" in written
    assert "Visual question answering 50.0 56.0 +6.0" in told


def test_tasks_stand_in_the_order_of_the_benchmark() -> None:
    for text in (
        plain(report.comparison_table(MADE)),
        report.comparison_markdown(MADE),
        words_of(report.comparison_page(MADE)),
    ):
        places = [text.index(name) for name in ("ImageNet-1K", "ScienceQA", "GQA", "CIRR")]
        assert places == sorted(places)


def test_everything_else_is_told_in_every_form() -> None:
    page = report.comparison_page(MADE)
    assert "slow_<b>" not in page and "<it>" not in page and "<script" not in page
    assert not re.search(r"https?://|url\(|@import", page)
    shown = " ".join(plain(report.comparison_table(MADE)).split())
    written = report.comparison_markdown(MADE)
    told = words_of(page)
    for text in (shown, written, told):
        assert "B is significantly better in 1 and worse in 1; in 1 every query has the" in text
        assert "not evaluated alike: labels fixed and legacy" in text
        assert "1 task could not be compared" in text
        assert all(word in text for word in ("dtype", "bfloat16", "float32", "VATEX"))
    assert "55.0 and 57.0, B − A +2.0 (+1.0 … +3.0), p <0.001" in shown
    assert "0.9876 0.9912 1 − 5e-4 1 − 2e-7 – – – –" in told
    assert "| GQA | 0.9876 | 0.9912 | 1 − 5e-4 | 1 − 2e-7 | – | – | – | – |" in written
    assert r"| VATEX | only one \| has \<it\> |" in written


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (Setting("dtype", "bfloat16", "float32"), True),
        (Setting("legacy_ndcg", False, True), True),  # decides about scores, not about data
        (Setting("limit", None, 3), False),  # of course the data differ, in every task
        (Setting("labels", "fixed", "legacy"), False),
    ],
)
def test_other_data_are_told_where_no_setting_explains_them(setting: Setting, told: bool) -> None:
    remarks = comparison_remarks(replace(MADE, settings=[setting]))
    other = "ImageNet-1K: prompts, media, names or answers are not the same in both runs. "
    assert any(remark.startswith(other) for remark in remarks) is told


def test_no_limit_is_told_in_words() -> None:
    made = replace(MADE, settings=[Setting("limit", None, 3)])
    assert "not evaluated alike: queries per task all and 3." in comparison_remarks(made)[0]
    assert "| queries per task | all | 3 |" in report.comparison_markdown(made)


def test_what_is_not_compared_comes_last_and_is_folded_where_it_is_long() -> None:
    reasons = {name: f"/runs/fast lists it as missing: {name}: torn" for name in TASKS}
    missing = [Missing(name, why) for name, why in reasons.items()]
    for count, folded in ((10, 0), (11, 1)):
        made = replace(MADE, not_compared=missing[:count])
        page = report.comparison_page(made)
        assert page.count('<details class="rows">') == folded
        order = [page.index(f"<h2>{title}") for title in ("Settings that differ", "Tasks",
            "Embeddings", "Not compared")]  # fmt: skip
        assert order == sorted(order)
        for text in (words_of(page), report.comparison_markdown(made)):
            assert text.count("/runs/fast lists it as missing: torn") == count
            assert text.rindex("GQA") < text.index("Not compared")
        shown = plain(report.comparison_table(made))
        assert shown.index("GQA") < shown.index("Not compared")


def test_equal_differences_have_no_interval() -> None:
    same = task("GQA", 0.5, 0.5, 0.0, 1.0, moved=(0, 0))
    made = replace(MADE, tasks=[same], overall=same.score)
    told = words_of(report.comparison_page(made))
    shown, written = plain(report.comparison_table(made), 110), report.comparison_markdown(made)
    assert "| GQA | 50.0 | 50.0 | 0.0 | – | 1.000 |" in written
    assert re.search(r"GQA +50\.0 +50\.0 +0\.0 +– +1\.000", shown)
    assert "GQA 50.0 50.0 0.0 – 1.000" in told
    for text in (told, " ".join(shown.split()), written):
        assert "0.0 … 0.0" not in text
        assert "A dash stands for an interval where every query has the same difference" in text
    assert "B − A 0.0, p 0.333." in shown
    assert "95 % " not in told[: told.index("Before comparing")]
    assert made.to_json()["tasks"][0]["score"]["interval"] == (0.0, 0.0)


def test_gridlines_fall_on_zero_and_on_halves() -> None:
    page = report.comparison_page(MADE)
    assert re.search(r"\.track\.thin \{ --step: 25%;", page)
    assert "transparent 1px var(--step, 20%)" in page


def test_equal_runs_are_said_to_be_equal() -> None:
    same = replace(
        task("GQA", 0.5, 0.5, 0.0, 1.0, moved=(0, 0)), ranks=RankAgreement(1.0, 1.0, 1.0)
    )
    assert report.outcome(replace(MADE, tasks=[same])) == (
        "Every query of 1 task has the same value in both, and the rankings are the same."
    )
    moved = replace(same, ranks=RankAgreement(1.0, 1.0, 0.9))
    assert report.outcome(replace(MADE, tasks=[moved])).endswith("the same value in both.")


def test_nothing_in_common() -> None:
    for text in (
        plain(report.comparison_table(NOTHING)),
        report.comparison_markdown(NOTHING),
        report.comparison_page(NOTHING),
    ):
        assert text
    assert "no task in common" in report.comparison_page(NOTHING)


@pytest.mark.parametrize(
    ("largest", "reach"), [(0.14, 0.15), (0.15, 0.15), (0.161, 0.2), (0.83, 1.0), (0.0, 0.005)]
)
def test_the_axis_holds_every_interval(largest: float, reach: float) -> None:
    one = replace(
        task("GQA", 0.5, 0.5, 0.0, 1.0), score=Delta(0.5, 0.5, 0.0, Interval(-largest, 0.0), 1.0)
    )
    assert report.scale(replace(MADE, tasks=[one])) == pytest.approx(reach)


def test_dots_lie_where_the_differences_are() -> None:
    page = report.comparison_page(replace(MADE, tasks=[MADE.tasks[1]]))  # ±15 points
    assert re.findall(r'class="dot" style="--at:([\d.]+)"', page) == ["83.33"]  # +10
    assert re.findall(r'class="reach" style="--low:([\d.]+);--high:([\d.]+)"', page) == [
        ("70.00", "96.67")
    ]


@pytest.mark.parametrize("width", [80, 110])
def test_the_terminal_is_not_overrun(width: int) -> None:
    lines = plain(report.comparison_table(MADE), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.strip().startswith("ImageNet-1K") for line in lines)


def test_runs_on_disk_can_be_told(tmp_path: Path) -> None:
    """The forms take what ``compare`` makes."""
    known = TASKS["GQA"]
    for name, right in (("one", 3), ("two", 9)):
        rankings = [
            Ranking(f"q{row}", ("a", "b") if row < right else ("b", "a"), (0.5, 0.25), ("a",))
            for row in range(12)
        ]
        RunFolder(tmp_path / name).write(score_task(known, rankings, 2), rankings)
        (tmp_path / name / "run.json").write_text(json.dumps({"model": name, "settings": {}}))
    found = compare(RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two"))
    assert "| GQA | 25.0 | 75.0 | ▲ +50.0 |" in report.comparison_markdown(found)
    assert "▲ +50.0" in plain(report.comparison_table(found))
    page = words_of(report.comparison_page(found))
    assert "Embeddings" not in page and "model one two" in page
