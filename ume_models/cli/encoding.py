"""From the options of a command to a loaded model, and from rows of a file to a shard."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch

import ume_models
from ume_kernels.dispatch import explain
from ume_models import encode
from ume_models.cli.items_file import ItemsFile
from ume_models.cli.options import BUNDLED, EncodingOptions, OnError
from ume_models.cli.terminal import log
from ume_models.embedder import Embedder
from ume_models.embedders.base import BackboneEmbedder
from ume_models.embedders.loading import pick_device
from ume_models.embedders.registry import family_class
from ume_models.errors import ErrorKind, ItemError, OptionError, UmeError
from ume_models.store import Manifest, Shard, Skipped

SMALL = (
    "the bundled model is a small demonstration model that knows digits, scenes, charts, pages and "
    "clips like those of `ume demo`; a real one: --model FOLDER, or a hub id such as "
    "CUDAOUTOFMEMORY/PLUME-Qwen2-VL-2B"
)
Progress = Callable[[int, int], None]


def load_model(
    options: EncodingOptions,
    *,
    empty: Literal["error", "reference"] = "error",
    told: bool = True,
) -> BackboneEmbedder:
    """The model of these options, ready to embed; ``empty`` is as ``ume_models.load`` takes it.

    With ``told``, a warning says so if it is the bundled one.

    Raises:
        UmeError: the checkpoint, the device or another option cannot be used.
    """
    chosen = {
        name: getattr(options, name)
        for name in ("device", "dtype", "family", "profile", "engine", "multi_image", "pictures")
    }
    path = None if options.model == BUNDLED else options.model
    pick_device(options.device)
    begun = time.perf_counter()
    model = ume_models.load(path, **chosen, empty=empty, **options.options)
    if log.isEnabledFor(logging.DEBUG):
        about = f"family {model.family}, profile {model.profile.name}, {model.dtype}"
        seconds = time.perf_counter() - begun
        log.debug("%s: %s on %s, loaded in %.1f s", options.model, about, model.device, seconds)
        for report in explain():
            log.debug("%s: %s, %s", report.op, report.backend.value, report.reason)
    if path is None and told:
        log.warning(SMALL)
    return model


def require_clips(model: BackboneEmbedder, remedy: str) -> None:
    """Raise early if a model's profile takes no clips.

    Args:
        remedy: what else can be done, beside another profile.

    Raises:
        OptionError: it takes none; the profiles that do are named.
    """
    if model.profile.rules.clips != "refuse":
        return
    known = family_class(model.family).profiles.values()
    able = [profile.name for profile in known if profile.rules.clips != "refuse"]
    raise OptionError(
        f"{model.family} takes no clips under the profile {model.profile.name}; "
        f"use --profile {' or '.join(able)}, {remedy}"
    )


def describe_run(
    model: Embedder, options: EncodingOptions, items: ItemsFile, output: Path, shard_size: int
) -> Manifest:
    """The manifest of embedding ``items`` with a loaded model into the folder ``output``."""
    return Manifest(
        package_version=ume_models.__version__,
        model=_lasting_name(options.model),
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        encoding=encode.encoding_settings(model, None, options.batch_tokens),
        items_digest=items.digest,
        num_items=len(items),
        shard_size=shard_size,
        media_folders=_media_folders(items.folder, output.absolute()),
    )


def embed_rows(
    model: Embedder,
    items: ItemsFile,
    rows: Iterable[int],
    *,
    batch_tokens: int | None,
    on_error: OnError,
    workers: int,
    progress: Progress | None = None,
) -> Shard:
    """Embed some rows of a file.

    Args:
        batch_tokens: tokens per batch, None for the default.
        on_error: "stop" raises, "skip" lists the item among the skipped ones.
        workers: threads that read and decode media.
        progress: called with the numbers of finished and of all different items of these rows;
            None for a bar where stderr is a terminal.

    Raises:
        UmeError: an item cannot be embedded, with ``on_error="stop"``, or the file has changed
            since it was checked; the line is named.
    """
    found = items.read(rows)
    usable = [entry for entry in found if entry.item is not None]
    problems = {entry.row: entry.problem for entry in found if entry.item is None}
    if on_error == "stop":
        for row, reason in problems.items():
            raise UmeError(f"{items.where(row)}: {reason}")
    embeddings = torch.empty(0, model.hidden_size)
    if usable:
        try:
            output = encode.encode_detailed(
                model,
                [entry.item for entry in usable],
                batch_tokens=batch_tokens,
                workers=workers,
                progress=progress if log.isEnabledFor(logging.INFO) else False,
                on_error="raise" if on_error == "stop" else "skip",
            )
        except ItemError as error:
            if error.index is None:
                raise
            row = usable[error.index].row
            hint = " (here: --multi-image all|first)" * (error.kind is ErrorKind.NEEDS_CHOICE)
            raise UmeError(f"{items.where(row)}: {error.reason}{hint}", kind=error.kind) from error
        embeddings = output.embeddings.cpu()
        for problem in output.errors:
            if problem.index is not None:  # encode_detailed always tells it
                problems[usable[problem.index].row] = problem.reason
    kept = [position for position, entry in enumerate(usable) if entry.row not in problems]
    return Shard(
        rows=torch.tensor([usable[position].row for position in kept], dtype=torch.int64),
        embeddings=embeddings[kept],
        records=[usable[position].record for position in kept],
        skipped=[
            Skipped(entry.row, entry.record.id, problems[entry.row])
            for entry in found
            if entry.row in problems
        ],
    )


def _lasting_name(model: str) -> str:
    """Name under which the checkpoint is found from any working directory."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _media_folders(folder: Path, output: Path) -> tuple[str, ...]:
    """Where media are looked for later: beside the store as now, or where they are now."""
    try:
        return (os.path.relpath(folder, output), str(folder))
    except ValueError:  # another drive
        return (str(folder),)
