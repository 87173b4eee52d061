"""``ume eval run``: benchmarks from tables to scores, in one process or in many."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ume_models.cli.eval.report import publish
from ume_models.cli.eval.selection import (
    DataOption,
    DecodersOption,
    GalleryOption,
    OutputOption,
    data_root,
    selection_options,
)
from ume_models.cli.options import (
    EncodingOptions,
    OnError,
    encoding_options,
    path_option,
    takes,
)
from ume_models.cli.terminal import resumable, tell

if TYPE_CHECKING:
    from ume_models.mmeb.settings import EvalOptions
    from ume_models.mmeb.summary import Summary
    from ume_models.mmeb.tasks import Task
    from ume_models.mmeb.team import Team

_AGAIN = "What is done is kept: run the same command again, without --overwrite, to go on."


@takes(selection=selection_options, encoding=encoding_options)
def run(
    selection: Any,
    encoding: Any,
    data: DataOption = None,
    output: OutputOption = None,
    embeddings: Annotated[Path | None, path_option(
        "--embeddings",
        metavar="DIR",
        help="Instead of a model: score embeddings that another program stored, as "
        "TASK/queries.npy, candidates.npy, candidates.json; or the official TASK_qry, TASK_tgt, "
        "TASK_info.jsonl.",
    )] = None,
    legacy_ndcg: Annotated[bool, typer.Option(
        "--legacy-ndcg", help="Pair graded relevance with pages as the official metric does."
    )] = False,
    workers: DecodersOption = None,
    top: Annotated[int, typer.Option(
        min=10, metavar="N", help="Places of each ranking to keep."
    )] = 100,
    on_error: Annotated[OnError, typer.Option(
        help="skip: tasks with unusable data are listed as missing, others go on."
    )] = "stop",
    overwrite: Annotated[bool, typer.Option(
        "--overwrite", help="Start anew and replace the results in DIR."
    )] = False,
    gallery: GalleryOption = 3,
) -> None:
    """Evaluate on MMEB-v2, MMEB-V1 or M-BEIR. A stopped run goes on where it was.

    DIR gets summary.json, summary.md, report.html and, per task, scores and predictions, beside
    the embeddings. Start the same command again after a stop: the result is the same to the byte.
    Tasks add up: the summary has all that were ever asked for in DIR.
    Several processes or hosts share the work when torchrun starts them.

    [bold]Examples[/]

        ume eval run --data miniature -o runs/miniature

        ume eval run --model PLUME-2B --data MMEB-V2 -o runs/plume

        torchrun --nproc-per-node 8 -m ume_models eval run --data MMEB-V2 -o runs/bundled
    """
    # torch prints a page of frames when a process of a team is gone; who it was is told anyway.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ume_models.cli.eval.progress import EvalProgress
    from ume_models.mmeb.settings import EvalOptions
    from ume_models.mmeb.stored_run import score_folder

    if output is None:
        raise typer.BadParameter("is needed", param_hint="--output / -o")
    options = EvalOptions(
        batch_tokens=encoding.batch_tokens,
        workers=2 if workers is None else workers,
        top=top,
        legacy_ndcg=legacy_ndcg,
        on_error=on_error,
    )
    tasks, reading = selection
    how = {"reading": reading, "overwrite": overwrite}
    root = None if data is None else Path(data)
    summary: Summary | None
    with resumable(_AGAIN):
        if embeddings is not None:
            with EvalProgress() as progress:
                summary = score_folder(
                    embeddings, tasks, output, data=root, options=options, progress=progress, **how
                )
        else:
            root, summary = _evaluate(data, tasks, output, encoding, options, workers is None, how)
        if summary is not None:
            publish(summary, output, root, tasks, reading, gallery)


def _evaluate(
    data: str | None,
    tasks: list[Task],
    output: Path,
    encoding: EncodingOptions,
    options: EvalOptions,
    workers_by_device: bool,
    how: dict[str, Any],
) -> tuple[Path, Summary | None]:
    """The data root and the scores; None for processes that do not lead.

    With ``workers_by_device``, a GPU gets more threads that decode than ``options`` says.
    """
    from ume_models.cli.encoding import load_model, require_clips
    from ume_models.cli.eval.progress import EvalProgress
    from ume_models.mmeb.progress import Progress
    from ume_models.mmeb.run import evaluate
    from ume_models.mmeb.team import gather, local_device

    team = gather()
    try:
        _tell_who_is_lost(team)
        root = data_root(data, output, team.leads)
        encoding = replace(encoding, device=local_device(encoding.device, team))
        # As the official evaluation embeds empty texts.
        model = load_model(encoding, empty="reference", told=team.leads)
        if any(task.modality == "video" for task in tasks):
            require_clips(model, "or --modality image,visdoc")
        if workers_by_device and model.device.type == "cuda":
            options = replace(options, workers=_share_of_cores(team))
        if team.leads:
            tell(f"family: {model.family}, profile: {model.profile.name}")
        with EvalProgress() as shown:
            summary = evaluate(
                model, tasks, root, output, name=encoding.model, options=options, team=team,
                progress=shown if team.leads else Progress(), **how,
            )  # fmt: skip
        if team.leads and model.writes(model.options):
            _tell_what_was_written(output / "timing.json")
        return root, summary
    finally:
        team.close()


def _tell_what_was_written(path: Path) -> None:
    """Words of a model that reasons, over all kinds of items; nothing where none were embedded."""
    if path.exists():
        kinds = json.loads(path.read_text(encoding="utf-8")).values()
        rows, written, direct, fallbacks = (
            sum(kind[name] for kind in kinds)
            for name in ("unique", "written", "direct", "fallbacks")
        )
        tell(
            f"{written} tokens written for {rows} rows; {direct / max(rows, 1):.0%} direct, "
            f"{fallbacks} without the embedding token"
        )


def _share_of_cores(team: Team) -> int:
    """Threads that decode for one of a host's GPUs; one core is left to the model's own thread."""
    allowed, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    # A launcher may have given this process cores of its own.
    share = allowed // team.local_size() if allowed == cores else allowed
    return min(max(share - 1, 2), 8)


def _tell_who_is_lost(team: Team) -> None:
    """When the launcher ends this process because another one died, say which."""
    from ume_models.mmeb.team import TeamError, TorchTeam

    if not isinstance(team, TorchTeam):
        return

    def end(number: int, frame: FrameType | None) -> None:
        lost = team.lost()
        raise TeamError(f"{lost} has died. {_AGAIN}" if lost else f"told to end. {_AGAIN}")

    signal.signal(signal.SIGTERM, end)
