"""Commands about measuring: eval and bench."""

# ruff: noqa: UP045 - typer evaluates annotations at run time
from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from ume_models.cli.options import MODEL_PANEL, OnError, takes_encoding


class Labels(str, Enum):
    """Which labels of the pages count."""

    FIXED = "fixed"
    LEGACY = "legacy"


class Instructions(str, Enum):
    """Whose wording of the instructions."""

    PLUME = "plume"
    VLM2VEC = "vlm2vec"


_WORKERS = 2
_DATA, _WHAT, _OTHER = "Data", "Tasks", "Instead of evaluating a model"


@takes_encoding
def evaluate(
    encoding: Any,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="ROOT",
            help="Folder with image-tasks, video-tasks and visdoc-tasks, as published; or the word "
            "miniature for a small one of all tasks, made on the spot.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the results."),
    ] = None,
    benchmark: Annotated[
        str,
        typer.Option(
            help="MMEB-v2, MMEB-v2-2026 (corrected, as on the leaderboard), MMEB-v1 or M-BEIR.",
            rich_help_panel=_WHAT,
        ),
    ] = "MMEB-v2",
    tasks: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAMES",
            help="Names or groups, with commas: CIRR,V-RET. --list shows them.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    modality: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAMES",
            help="image, video, visdoc.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            metavar="N",
            help="Only the first N queries of each task; candidates are never reduced.",
            show_default="all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    frames: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            metavar="N",
            help="Frames per video.",
            show_default="the profile's, else 8",
            rich_help_panel=_DATA,
        ),
    ] = None,
    labels: Annotated[
        Labels,
        typer.Option(
            help="legacy: the wrong page labels published first, for comparison with old scores.",
            rich_help_panel=_DATA,
        ),
    ] = Labels.FIXED,
    instructions: Annotated[
        Instructions,
        typer.Option(help="Whose instructions; for ViDoRe, plume has none.", rich_help_panel=_DATA),
    ] = Instructions.PLUME,
    legacy_ndcg: Annotated[
        bool,
        typer.Option(
            "--legacy-ndcg",
            help="Pair graded relevance with pages as the official metric does.",
            rich_help_panel=_DATA,
        ),
    ] = False,
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
    workers: Annotated[
        Optional[int],
        typer.Option(
            min=0,
            help="Threads that read and decode media ahead of the model.",
            metavar="N",
            show_default="2; on a GPU its share of the cores, up to 8",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=10, help="Places of each ranking to keep.", metavar="N")
    ] = 100,
    on_error: Annotated[
        OnError,
        typer.Option(help="skip: tasks with unusable data are listed as missing, others go on."),
    ] = OnError.STOP,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew and replace the results in DIR.")
    ] = False,
    gallery: Annotated[
        int, typer.Option(min=0, help="Failures per task shown in the page.", metavar="N")
    ] = 3,
    show_list: Annotated[
        bool, typer.Option("--list", help="Print the table of tasks.", rich_help_panel=_OTHER)
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Verify the data root: tables, labels, every picture. Needs neither model nor -o.",
            rich_help_panel=_OTHER,
        ),
    ] = False,
    embeddings: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            help="Score embeddings that another program stored: TASK/queries.npy, candidates.npy, "
            "candidates.json; or the official TASK_qry, TASK_tgt, TASK_info.jsonl.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    compare: Annotated[
        Optional[tuple[Path, Path]],
        typer.Option(
            metavar="A B",
            help="Compare the results of two evaluations; -o writes them too.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
) -> None:
    """Evaluate on MMEB-v2, MMEB-V1 or M-BEIR. A stopped run goes on where it was.

    DIR gets summary.json, summary.md, report.html and, per task, scores and predictions, beside
    the embeddings. Start the same command again after a stop: the result is the same to the byte.
    Tasks add up: the summary has all that were ever asked for in DIR.
    Several processes or hosts share the work when torchrun starts them.

    [bold]Examples[/]

        ume eval --data miniature -o runs/miniature

        ume eval --model PLUME-2B --data MMEB-V2 --check

        ume eval --model PLUME-2B --data MMEB-V2 -o runs/plume

        torchrun --nproc-per-node 8 -m ume_models.cli eval --data MMEB-V2 -o runs/bundled

        ume eval --compare runs/plume runs/other
    """
    # torch prints a page of frames when a process of a team is gone; who it was is told anyway.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ume_models.commands import evaluate as command
    from ume_models.mmeb.dataset import ReadOptions
    from ume_models.mmeb.settings import EvalOptions

    if compare is not None:
        command.compare(compare[0], compare[1], output)
        return
    reading = ReadOptions(
        labels=labels.value,
        instructions=instructions.value,
        limit=limit,
        frames=frames,
        momentseeker_leak=momentseeker_leak,
        download=download,
    )
    selection = command.Selection(benchmark, tasks or [], modality or [], reading)
    if show_list:
        command.show_tasks(selection)
        return
    if check:
        command.check(_needed(data, "--data"), output, selection, workers or _WORKERS)
        return
    stop_or_skip: Literal["stop", "skip"] = "skip" if on_error is OnError.SKIP else "stop"
    options = EvalOptions(
        batch_tokens=encoding.batch_tokens,
        workers=_WORKERS if workers is None else workers,
        top=top,
        legacy_ndcg=legacy_ndcg,
        on_error=stop_or_skip,
    )
    shared: dict[str, Any] = {"overwrite": overwrite, "gallery": gallery}
    target = _needed(output, "--output / -o")
    if embeddings is not None:
        root = None if data is None else Path(data)
        command.score_stored(embeddings, root, target, selection, options, **shared)
        return
    command.run(
        _needed(data, "--data"), target, selection, encoding, options,
        workers_by_device=workers is None, **shared,
    )  # fmt: skip


bench = typer.Typer(name="bench", help="Results of the benchmarks.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    pass


@bench.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS.json",
            help="What `pytest benchmarks --benchmark-only --benchmark-json=FILE` wrote, a GPU "
            "session, or a kept file.",
        ),
    ],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write tables, a page and plots there, too."
        ),
    ] = None,
    keep: Annotated[
        Optional[Path],
        typer.Option(
            metavar="PATH",
            help="Write what is worth keeping, without the names of machine and user: a folder "
            "(then the name has machine and date) or a .json file.",
        ),
    ] = None,
) -> None:
    """Tables and plots of benchmark results.

    [bold]Examples[/]

        pytest benchmarks --benchmark-only --benchmark-json=out.json

        ume bench report out.json -o report
    """
    from ume_models.commands import bench_report as command

    command.run(files, output, keep)


def _needed(value: Any, option: str) -> Any:
    if value is None:
        raise typer.BadParameter("is needed", param_hint=option)
    return value
