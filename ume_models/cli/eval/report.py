"""``ume eval report``: the scores of an evaluation for readers, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ume_models.cli.eval.selection import DataOption, GalleryOption
from ume_models.cli.output_file import write_output
from ume_models.cli.terminal import ExitCode, results, tell
from ume_models.errors import DataError

if TYPE_CHECKING:
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.summary import Summary
    from ume_models.mmeb.tasks import Task
    from ume_models.retrieval.gallery import Section


def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `ume eval run -o`.")],
    data: DataOption = None,
    gallery: GalleryOption = 3,
) -> None:
    """Print the scores of an evaluation again, and write summary.md and report.html anew.

    Pictures of failures are read from the data root that was evaluated; --data says where it is
    now.

    [bold]Example[/]

        ume eval report runs/plume --gallery 10
    """
    from ume_models.mmeb.benchmarks import benchmark
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.score_file import read_object
    from ume_models.mmeb.settings import read_manifest
    from ume_models.mmeb.summary import Summary

    manifest = read_manifest(run)
    path = run / "summary.json"
    summary = Summary.from_json(read_object(path, "run the same `ume eval run` command again"))
    names = {score.task for score in summary.tasks}
    tasks = [task for task in benchmark(manifest["benchmark"]) if task.name in names]
    settings, known = manifest["settings"], [field.name for field in fields(ReadOptions)]
    reading = ReadOptions(**{name: settings[name] for name in known if name in settings})
    root = data or manifest.get("data")
    publish(summary, run, Path(root) if root else None, tasks, reading, gallery)


def publish(
    summary: Summary,
    output: Path,
    data: Path | None,
    tasks: Sequence[Task],
    reading: ReadOptions,
    gallery: int,
) -> None:
    """Print the scores and write them as Markdown and as a page with pictures of failures.

    Raises:
        typer.Exit: with 3, if a task has no score.
    """
    from ume_models.mmeb.report import markdown, page, terminal

    # The files first: whoever reads the output may stop reading.
    write_output(output / "summary.md", markdown.summary_markdown(summary))
    sections: list[Section] = []
    if data is not None and gallery:
        sections = _failures(summary, output, data, tasks, reading, gallery)
    write_output(output / "report.html", page.summary_page(summary, sections))
    results().print(terminal.summary_table(summary))
    tell(f"scores: {output / 'summary.json'}, page: {output / 'report.html'}")
    if summary.missing:
        raise typer.Exit(ExitCode.SKIPPED)


def _failures(
    summary: Summary,
    output: Path,
    data: Path,
    tasks: Sequence[Task],
    reading: ReadOptions,
    cases: int,
) -> list[Section]:
    """Queries that went wrong, of every task whose data are here."""
    from ume_models.mmeb.readers import read_task
    from ume_models.mmeb.report.failures import failure_section
    from ume_models.mmeb.results import RunFolder

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
