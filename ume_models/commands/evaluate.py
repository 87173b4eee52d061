"""``ume eval``: benchmarks from tables to scores, in one process or in many."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import typer

from ume_models.commands.console import messages, results
from ume_models.commands.encoding import EncodingOptions, load_model
from ume_models.commands.eval_progress import EvalProgress
from ume_models.commands.outcome import ExitCode, failures_reported
from ume_models.commands.output_file import write_output
from ume_models.errors import DataError
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.dataset import ReadOptions
from ume_models.mmeb.locate import misplaced
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.results import RunFolder
from ume_models.mmeb.run import evaluate
from ume_models.mmeb.settings import EvalOptions, held
from ume_models.mmeb.summary import Summary
from ume_models.mmeb.tasks import Task, select_tasks
from ume_models.mmeb.team import Team, TeamError, TorchTeam, gather, local_device
from ume_models.retrieval.gallery import Section

MINIATURE = "miniature"
_AGAIN = "What is done is kept: run the same command again, without --overwrite, to go on."


@dataclass(frozen=True)
class Selection:
    """Which tasks, and how they are read.

    Attributes:
        benchmark: name of the benchmark.
        tasks: names or groups of tasks, empty for all.
        modalities: "image", "video", "visdoc", empty for all.
        reading: how tables are read.
    """

    benchmark: str = "MMEB-v2"
    tasks: Sequence[str] = ()
    modalities: Sequence[str] = ()
    reading: ReadOptions = field(default_factory=ReadOptions)

    def chosen(self) -> list[Task]:
        """The tasks, in the order of the table.

        Raises:
            typer.BadParameter: a name is unknown, or none is left of what was given.
        """
        names, modalities = _split(self.tasks), _split(self.modalities)
        if (self.tasks and not names) or (self.modalities and not modalities):
            raise typer.BadParameter("names no task; leave it out for all", param_hint="--tasks")
        try:
            return select_tasks(benchmark(self.benchmark), names=names, modalities=modalities)
        except DataError as error:
            raise typer.BadParameter(str(error)) from None


def run(
    data: str,
    output: Path,
    selection: Selection,
    encoding: EncodingOptions,
    options: EvalOptions,
    *,
    workers_by_device: bool,
    overwrite: bool,
    gallery: int,
) -> None:
    """Evaluate a model; exits with 3 if a task has no score.

    With ``workers_by_device``, a GPU gets more threads that decode than ``options`` says.
    """
    with failures_reported(when_interrupted=_AGAIN):
        tasks = selection.chosen()
        team = gather()
        try:
            _tell_who_is_lost(team)
            root = _data_root(data, output, team)
            encoding = replace(encoding, device=local_device(encoding.device, team))
            # As the official evaluation embeds empty texts.
            model = load_model(encoding, empty="reference")
            if workers_by_device and model.device.type == "cuda":
                options = replace(options, workers=_share_of_cores(team))
            if team.leads:
                told = f"family: {model.family}, profile: {model.profile.name}"
                messages().print(told, markup=False)
            with EvalProgress(quiet=not team.leads) as progress:
                summary = evaluate(
                    model,
                    tasks,
                    root,
                    output,
                    name=encoding.model,
                    reading=selection.reading,
                    options=options,
                    overwrite=overwrite,
                    team=team,
                    progress=progress,
                )
        finally:
            team.close()
        if summary is not None:
            publish(summary, output, root, tasks, selection.reading, gallery)


def publish(
    summary: Summary,
    output: Path,
    data: Path | None,
    tasks: Sequence[Task],
    reading: ReadOptions,
    gallery: int,
) -> None:
    """Print the scores and write them as Markdown and as a page with pictures of failures."""
    from ume_models.mmeb.report import markdown, page, terminal

    # The files first: whoever reads the output may stop reading.
    write_output(output / "summary.md", markdown.summary_markdown(summary))
    sections: list[Section] = []
    if data is not None and gallery:
        sections = _failures(summary, output, data, tasks, reading, gallery)
    write_output(output / "report.html", page.summary_page(summary, sections))
    results().print(terminal.summary_table(summary))
    messages().print(
        f"scores: {output / 'summary.json'}, page: {output / 'report.html'}", markup=False
    )
    if summary.missing:
        raise typer.Exit(ExitCode.SKIPPED)


def show_tasks(selection: Selection) -> None:
    """Print the tasks with what a reader of scores wants to know of them."""
    with failures_reported():
        rows = [("task", "group", "modality", "ranking", "metric", "tables")]
        for task in selection.chosen():
            source = task.tables(selection.reading.labels)
            where = f"{source.repository} {source.config or ''}".strip()
            rows.append((task.name, task.group, task.modality, task.ranking, task.metric, where))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:  # never cut: names are there to be copied
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())


def check(data: str, output: Path | None, selection: Selection, workers: int) -> None:
    """Look for everything that would stop an evaluation; exits with 1 if there is something."""
    from ume_models.mmeb.check import check as find_problems

    with failures_reported():
        if data == MINIATURE and output is None:
            raise typer.BadParameter(
                "--data miniature is written there", param_hint="--output / -o"
            )
        root = _data_root(data, output or Path(), gather())
        with EvalProgress() as progress:
            problems = find_problems(
                selection.chosen(),
                root,
                selection.reading,
                workers=max(1, workers),
                progress=progress.checking,
            )
        if problems and (wrong_root := misplaced(root, selection.chosen())):
            print(f"error: {wrong_root}")
        for problem in problems:
            print(problem)
        errors = sum(problem.severity == "error" for problem in problems)
        tasks = len(selection.chosen())
        if errors:
            print(f"errors: {errors}, warnings: {len(problems) - errors}, tasks: {tasks}")
            raise typer.Exit(ExitCode.FAILED)
        print(f"nothing stands in the way (tasks: {tasks}, warnings: {len(problems)})")


def score_stored(
    embeddings: Path,
    data: Path | None,
    output: Path,
    selection: Selection,
    options: EvalOptions,
    *,
    overwrite: bool,
    gallery: int,
) -> None:
    """Score embeddings that were stored by another program."""
    from ume_models.mmeb.stored_run import score_folder

    with failures_reported(when_interrupted=_AGAIN):
        tasks = selection.chosen()
        with EvalProgress() as progress:
            summary = score_folder(
                embeddings,
                tasks,
                output,
                data=data,
                reading=selection.reading,
                options=options,
                overwrite=overwrite,
                progress=progress,
            )
        publish(summary, output, data, tasks, selection.reading, gallery)


def compare(a: Path, b: Path, output: Path | None) -> None:
    """Print how two evaluations differ, and write it if asked to."""
    import json

    from ume_models.mmeb.compare import compare as compare_runs
    from ume_models.mmeb.embeddings import task_embeddings
    from ume_models.mmeb.report import comparison as report

    with failures_reported():
        found = compare_runs(RunFolder(a), RunFolder(b), task_embeddings)
        if output is not None:
            text = json.dumps(found.to_json(), ensure_ascii=False, indent=1) + "\n"
            write_output(output / "comparison.json", text)
            write_output(output / "comparison.md", report.comparison_markdown(found))
            write_output(output / "comparison.html", report.comparison_page(found))
        results().print(report.comparison_table(found))


def _share_of_cores(team: Team) -> int:
    """Threads that decode for one of a host's GPUs; one core is left to the model's own thread."""
    allowed, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    # A launcher may have given this process cores of its own.
    share = allowed // team.local_size() if allowed == cores else allowed
    return min(max(share - 1, 2), 8)


def _data_root(data: str, output: Path, team: Team) -> Path:
    """The data root; the miniature is written beside the results first."""
    if data != MINIATURE:
        root = Path(data)
        if not root.is_dir():
            raise DataError(
                f"{root} is not a folder: --data takes the folder with image-tasks, video-tasks "
                "and visdoc-tasks, or the word miniature for a small one made on the spot"
            )
        return root
    from ume_models.mmeb.miniature import write_miniature

    root = output / MINIATURE
    if team.leads and not root.is_dir():
        messages().print(f"writing the miniature to {root}", markup=False)
        with held(output):
            unfinished = output / f"{MINIATURE}-unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            # Without pyarrow the tables are in a form that needs none.
            write_miniature(unfinished, tables="parquet" if find_spec("pyarrow") else "jsonl")
            unfinished.rename(root)
    return root


def _failures(
    summary: Summary,
    output: Path,
    data: Path,
    tasks: Sequence[Task],
    reading: ReadOptions,
    cases: int,
) -> list[Section]:
    """Queries that went wrong, of every task that was read in this run."""
    from ume_models.mmeb.report.failures import failure_section

    folder, sections = RunFolder(output), []
    scores = {score.task: score for score in summary.tasks}
    for task in tasks:
        score = scores.get(task.name)
        if score is not None and score.score < 1:
            try:
                read = read_task(task, data, reading)
            except DataError:  # the scores stand without pictures
                continue
            section = failure_section(read, score, folder.rankings(task.name), cases=cases)
            if section.blocks:
                sections.append(section)
    return sections


def _tell_who_is_lost(team: Team) -> None:
    """When the launcher ends this process because another one died, say which."""
    if not isinstance(team, TorchTeam):
        return

    def end(number: int, frame: FrameType | None) -> None:
        lost = team.lost()
        raise TeamError(f"{lost} has died. {_AGAIN}" if lost else f"told to end. {_AGAIN}")

    signal.signal(signal.SIGTERM, end)


def _split(names: Sequence[str]) -> list[str]:
    """Names given one by one or with commas."""
    return [part for name in names for part in name.split(",") if part.strip()]
