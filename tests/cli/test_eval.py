"""``ume eval`` as users and launchers start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ume_models.cli import app
from ume_models.cli.eval.run import _share_of_cores
from ume_models.mmeb.embeddings import task_embeddings
from ume_models.mmeb.miniature import write_miniature
from ume_models.mmeb.team import LoneTeam
from ume_models.store import lock_folder, unlock_folder

TASKS = "CIRR,ActivityNetQA,ViDoSeek-page"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "miniature"
    write_miniature(root, tables="jsonl")
    return root


def ume(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    result = ume("--data", data, "-o", folder, "--tasks", TASKS)
    assert result.exit_code == 0, result.output
    assert "All tasks" in result.stdout and "ActivityNetQA: hit@1" in result.stderr
    return folder


def test_results_are_written_in_every_form(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert [score["task"] for score in summary["tasks"]] == TASKS.split(",")
    assert "ViDoSeek-page" in (done / "summary.md").read_text()
    page = (done / "report.html").read_text()
    assert "data:image" in page and "src=" not in page  # failures as pictures, all inside
    assert {path.name for path in (done / "tasks" / "CIRR").iterdir()} == {
        "items.json", "predictions.jsonl", "scores.json",
    }  # fmt: skip


def test_processes_of_a_launcher_agree_with_one(data: Path, done: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    moved = shutil.copytree(data, tmp_path / "moved")  # where data lie changes nothing
    together = subprocess.run(
        [sys.executable, *command, "-m", "ume_models.cli", "eval", "--data", str(moved),
         "-o", str(tmp_path / "b"), "--tasks", TASKS],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("All tasks") == 1
    found = ume("--compare", done, tmp_path / "b", "-o", tmp_path / "comparison")
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert [task["same_data"] for task in content["tasks"]] == [True] * 3
    assert (tmp_path / "comparison" / "comparison.html").is_file()
    for name in TASKS.split(","):
        one, two = (
            json.loads((folder / "tasks" / name / "scores.json").read_text())["scores"]
            for folder in (done, tmp_path / "b")
        )
        assert one == two


def test_files_are_written_before_the_table_is_told(data: Path, tmp_path: Path) -> None:
    """Whoever reads the output may stop reading: ``ume eval … | head -1``."""
    command = [sys.executable, "-m", "ume_models.cli", "eval", "--data", str(data), "--tasks",
               "CIRR", "-o", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    with open(os.devnull) as nobody:  # cannot be written to, as a pipe that nobody reads
        ended = subprocess.run(command, env=environment, stdout=nobody, stderr=subprocess.PIPE)
    assert ended.returncode != 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "summary.md").is_file()


def test_the_miniature_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    result = ume("--data", "miniature", "--tasks", "CIRR", "-o", tmp_path)
    unlock_folder(tmp_path, lock)
    assert result.exit_code == 1 and "another process is writing" in result.stderr
    assert not any(tmp_path.iterdir())


def test_stored_embeddings_have_the_same_scores(data: Path, done: Path, tmp_path: Path) -> None:
    queries, candidates, names = task_embeddings(done, "CIRR")
    folder = tmp_path / "stored" / "CIRR"
    folder.mkdir(parents=True)
    np.save(folder / "queries.npy", queries.numpy())
    np.save(folder / "candidates.npy", candidates.numpy())
    (folder / "candidates.json").write_text(json.dumps(names))
    result = ume(
        "--embeddings", folder.parent, "--data", data, "-o", tmp_path / "out", "--tasks", "CIRR"
    )
    assert result.exit_code == 0, result.output
    mine, theirs = (
        json.loads((run / "tasks" / "CIRR" / "scores.json").read_text())["scores"]
        for run in (tmp_path / "out", done)
    )
    assert mine == theirs


def test_a_data_root_is_checked(data: Path, tmp_path: Path) -> None:
    assert ume("--data", data, "--check", "--tasks", TASKS).exit_code == 0
    (tmp_path / "image-tasks").mkdir()
    result = ume("--data", tmp_path, "--check", "--tasks", "CIRR")
    assert result.exit_code == 1 and "CIRR" in result.stdout


def test_a_missing_task_is_listed_and_told_by_the_exit_code(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part in data.iterdir():
        if part.name != "video-tasks":
            (root / part.name).parent.mkdir(exist_ok=True)
            (root / part.name).symlink_to(part)
    arguments = ("--data", root, "-o", tmp_path / "out", "--tasks", TASKS)
    stopped = ume(*arguments)
    assert stopped.exit_code == 1 and "ActivityNetQA" in stopped.stderr
    skipped = ume(*arguments, "--on-error", "skip")
    assert skipped.exit_code == 3 and "ActivityNetQA" in skipped.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--data", "nowhere", "-o", "out"), 1, "nowhere is not a folder"),
        (("-o", "out"), 2, "--data"),
        (("--data", "."), 2, "--output"),
        (("--list", "--tasks", "CIIR"), 2, "did you mean CIRR"),
        (("--list", "--tasks", ","), 2, "names no task"),
        (("--list", "--benchmark", "MTEB"), 2, "unknown benchmark"),
        (("--compare", "a", "b"), 1, "run.json"),
        (("--embeddings", "nowhere", "-o", "out"), 1, "nowhere"),
    ],
)
def test_wrong_use_is_told(tmp_path, monkeypatch, arguments, code, said) -> None:
    monkeypatch.chdir(tmp_path)
    result = ume(*arguments)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("allowed", "cores", "processes", "threads"),
    [(16, 16, 1, 8), (16, 16, 4, 3), (64, 64, 8, 7), (4, 64, 8, 3), (2, 2, 1, 2)],
)
def test_cores_are_shared_by_the_processes_of_a_host(
    monkeypatch, allowed: int, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(allowed))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    team = LoneTeam()
    monkeypatch.setattr(team, "local_size", lambda: processes)
    assert _share_of_cores(team) == threads


def test_commands_and_the_options_of_before_do_the_same(
    data: Path, done: Path, tmp_path: Path
) -> None:
    for new, old in (
        (("list", "--tasks", "CIRR"), ("--list", "--tasks", "CIRR", "--data", data, "-o", "x")),
        (("check", "--data", data, "--tasks", TASKS),
         ("--model", "nowhere", "--data", data, "--tasks", TASKS, "--check")),
        (("compare", done, done), ("--compare", done, done)),
    ):  # fmt: skip
        one, other = ume(*new), ume(*old)
        assert one.exit_code == other.exit_code == 0, one.output + other.output
        assert one.stdout == other.stdout and one.stdout
    moved = shutil.copytree(done, tmp_path / "run")
    again = ume("run", "--data", data, "-o", moved, "--tasks", TASKS)
    assert again.exit_code == 0 and "nothing to embed" in again.stderr
    rows = json.loads(ume("list", "--json", "--tasks", TASKS).stdout)
    assert [row["task"] for row in rows] == TASKS.split(",")
    assert ume("--data", data, "run", "-o", moved).exit_code == 2


def test_a_report_is_made_again(done: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(done, tmp_path / "run")
    for name in ("report.html", "summary.md"):
        (moved / name).unlink()
    result = ume("report", moved)
    assert result.exit_code == 0 and "All tasks" in result.stdout
    for name in ("report.html", "summary.md"):
        assert (moved / name).read_bytes() == (done / name).read_bytes()
    assert ume("report", tmp_path).exit_code == 1


def test_a_miniature_is_checked_without_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ume("--check", "--data", "miniature", "--tasks", "CIRR").exit_code == 0
    assert not any(tmp_path.iterdir())


def test_the_table_of_tasks_is_whole() -> None:
    result = ume("--list")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 1 + 78
    assert (
        "ViDoRe_syntheticDocQA_artificial_intelligence" in result.stdout
        and "…" not in result.stdout
    )
    assert len(ume("--list", "--benchmark", "mmeb-v1").stdout.splitlines()) == 1 + 36
