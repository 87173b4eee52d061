"""Which tasks of which benchmark, how their tables are read, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ume_models.cli.options import path_option
from ume_models.cli.terminal import tell
from ume_models.errors import DataError

if TYPE_CHECKING:
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.tasks import Task

MINIATURE = "miniature"
_DATA, _WHAT = "Data", "Tasks"

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="ROOT",
        help="Folder with image-tasks, video-tasks and visdoc-tasks, as published; or the word "
        "miniature for a small one of all tasks, made on the spot.",
        rich_help_panel=_DATA,
    ),
]
OutputOption = Annotated[
    Path | None, path_option("--output", "-o", metavar="DIR", help="Folder for the results.")
]
DecodersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Threads that read and decode media ahead of the model.",
        metavar="N",
        show_default="2; on a GPU its share of the cores, up to 8",
    ),
]
GalleryOption = Annotated[
    int, typer.Option(min=0, help="Failures per task shown in the page.", metavar="N")
]


@dataclass(frozen=True)
class Selection:
    """Which tasks, and how they are read.

    Attributes:
        benchmark: name of the benchmark.
        tasks: names or groups of tasks, empty for all.
        modalities: "image", "video", "visdoc", empty for all.
        reading: how tables are read.
    """

    benchmark: str
    tasks: Sequence[str]
    modalities: Sequence[str]
    reading: ReadOptions

    def chosen(self) -> list[Task]:
        """The tasks, in the order of the table.

        Raises:
            typer.BadParameter: a name is unknown, or none is left of what was given.
        """
        from ume_models.mmeb.benchmarks import benchmark
        from ume_models.mmeb.tasks import select_tasks

        names, modalities = _split(self.tasks), _split(self.modalities)
        if (self.tasks and not names) or (self.modalities and not modalities):
            raise typer.BadParameter("names no task; leave it out for all", param_hint="--tasks")
        try:
            return select_tasks(benchmark(self.benchmark), names=names, modalities=modalities)
        except DataError as error:
            raise typer.BadParameter(str(error)) from None


def selection_options(
    benchmark: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="MMEB-v2, MMEB-v2-2026 (corrected, as on the leaderboard), MMEB-v1 or M-BEIR.",
            rich_help_panel=_WHAT,
        ),
    ] = "MMEB-v2",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Names or groups, with commas: CIRR,V-RET. `ume eval list` shows them.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="image, video, visdoc.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Only the first N queries of each task; candidates are never reduced.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Frames per video.",
            show_default="the profile's, else 8",
            rich_help_panel=_DATA,
        ),
    ] = None,
    labels: Annotated[
        Literal["fixed", "legacy"],
        typer.Option(
            help="legacy: the wrong page labels published first, for comparison with old scores.",
            rich_help_panel=_DATA,
        ),
    ] = "fixed",
    instructions: Annotated[
        Literal["plume", "vlm2vec"],
        typer.Option(help="Whose instructions; for ViDoRe, plume has none.", rich_help_panel=_DATA),
    ] = "plume",
    momentseeker_leak: Annotated[
        bool,
        typer.Option(
            "--momentseeker-leak",
            help="Missing query pictures of MomentSeeker: a frame of the answer, as PLUME does.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch tables that are not below ROOT from the hub (not images and frames).",
            rich_help_panel=_DATA,
        ),
    ] = False,
) -> Selection:
    """Tasks and their reading, as options of a command."""
    from ume_models.mmeb.dataset import ReadOptions

    reading = ReadOptions(labels, instructions, limit, frames, momentseeker_leak, download)
    return Selection(benchmark, tasks or [], modality or [], reading)


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


def _split(names: Sequence[str]) -> list[str]:
    """Names given one by one or with commas."""
    return [part for name in names for part in name.split(",") if part.strip()]
