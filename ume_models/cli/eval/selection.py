"""Which tasks of which benchmark, how their tables are read, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ume_models.cli.options import path_option
from ume_models.cli.terminal import tell
from ume_models.errors import DataError

if TYPE_CHECKING:
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.tasks import Task

MINIATURE = "miniature"
_DATA = "Data"

DataOption = Annotated[str | None, typer.Option(
    metavar="ROOT",
    help="Folder with image-tasks, video-tasks and visdoc-tasks, as published; or the word "
    "miniature for a small one of all tasks, made on the spot.",
    rich_help_panel=_DATA,
)]
OutputOption = Annotated[Path | None, path_option(
    "--output", "-o", metavar="DIR", help="Folder for the results."
)]
DecodersOption = Annotated[int | None, typer.Option(
    min=0,
    metavar="N",
    help="Threads that read and decode media ahead of the model.",
    show_default="2; on a GPU its share of the cores, up to 8",
)]
GalleryOption = Annotated[int, typer.Option(
    min=0, metavar="N", help="Failures per task shown in the page."
)]


def _what(text: str, **told: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Tasks", **told)


def _data(text: str, *names: str, **told: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_DATA, **told)


class Selection(NamedTuple):
    """The tasks, in the order of the benchmark's table, and how they are read."""

    tasks: list[Task]
    reading: ReadOptions


def selection_options(
    benchmark: Annotated[str, _what(
        "MMEB-v2, MMEB-v2-2026 (corrected, as on the leaderboard), MMEB-v1 or M-BEIR.",
        metavar="NAME",
    )] = "MMEB-v2",
    tasks: Annotated[list[str] | None, _what(
        "Names or groups, with commas: CIRR,V-RET. `ume eval list` shows them.",
        metavar="NAMES", show_default="all",
    )] = None,
    modality: Annotated[list[str] | None, _what(
        "image, video, visdoc.", metavar="NAMES", show_default="all"
    )] = None,
    limit: Annotated[int | None, _what(
        "Only the first N queries of each task; candidates are never reduced.",
        min=1, metavar="N", show_default="all",
    )] = None,
    frames: Annotated[int | None, _data(
        "Frames per video.", min=1, metavar="N", show_default="the profile's, else 8"
    )] = None,
    labels: Annotated[Literal["fixed", "legacy"], _data(
        "legacy: the wrong page labels published first, for comparison with old scores."
    )] = "fixed",
    instructions: Annotated[Literal["plume", "vlm2vec"], _data(
        "Whose instructions; for ViDoRe, plume has none."
    )] = "plume",
    momentseeker_leak: Annotated[bool, _data(
        "Missing query pictures of MomentSeeker: a frame of the answer, as PLUME does.",
        "--momentseeker-leak",
    )] = False,
    download: Annotated[bool, _data(
        "Fetch tables that are not below ROOT from the hub (not images and frames).", "--download"
    )] = False,
) -> Selection:
    """Tasks and their reading, as options of a command.

    Raises:
        typer.BadParameter: a name is unknown, or none is left of what was given.
    """
    from ume_models.mmeb.benchmarks import benchmark as known
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.tasks import select_tasks

    names, modalities = _split(tasks), _split(modality)
    if (tasks and not names) or (modality and not modalities):
        raise typer.BadParameter("names no task; leave it out for all", param_hint="--tasks")
    try:
        chosen = select_tasks(known(benchmark), names=names, modalities=modalities)
    except DataError as error:
        raise typer.BadParameter(str(error)) from None
    reading = ReadOptions(labels, instructions, limit, frames, momentseeker_leak, download)
    return Selection(chosen, reading)


def data_root(data: str | None, output: Path, writes: bool = True) -> Path:
    """The data root; the miniature is made in the folder ``output`` first, if this process writes.

    Raises:
        DataError: it is not a folder.
        StoreError: another process writes to ``output``.
        typer.BadParameter: there is none.
    """
    if data is None:
        raise typer.BadParameter("is needed", param_hint="--data")
    if data != MINIATURE:
        root = Path(data)
        if not root.is_dir():
            raise DataError(
                f"{root} is not a folder: --data takes the folder with image-tasks, video-tasks "
                "and visdoc-tasks, or the word miniature for a small one made on the spot"
            )
        return root
    import shutil
    from importlib.util import find_spec

    from ume_models.mmeb.miniature import write_miniature
    from ume_models.mmeb.settings import held

    root = output / MINIATURE
    if writes and not root.is_dir():
        tell(f"writing the miniature to {root}")
        with held(output):
            unfinished = output / f"{MINIATURE}-unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            # Without pyarrow the tables are in a form that needs none.
            write_miniature(unfinished, tables="parquet" if find_spec("pyarrow") else "jsonl")
            unfinished.rename(root)
    return root


def _split(names: Sequence[str] | None) -> list[str]:
    """Names given one by one or with commas."""
    return [part for name in names or () for part in name.split(",") if part.strip()]
