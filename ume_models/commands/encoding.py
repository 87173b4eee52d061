"""From the options of a command to a loaded model, and from rows of a file to a shard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import ume_models
from ume_models import encode
from ume_models.commands.items_file import ItemsFile
from ume_models.embedders.loading import pick_device
from ume_models.errors import ItemError, UmeError
from ume_models.store import Manifest, Shard, Skipped

BUNDLED = "bundled"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodingOptions:
    """How items are embedded.

    Attributes:
        model: checkpoint folder or name, or ``BUNDLED``.
        engine: "fast" or "reference".
        device, dtype: as ``ume_models.load`` takes them.
        mode: "gen", "disc" or "last".
        latent_steps: latent steps, None for the default of ``ume_models.load``.
        context: what the router sees beside the latent state.
        multi_image: what to do with several images: "all", "first", or None to refuse.
        batch_tokens: tokens per batch, None for the default.
        disc_offset: token read with mode "disc", see ``PlumeSettings``.
    """

    model: str = BUNDLED
    engine: str = "fast"
    device: str = "auto"
    dtype: str = "auto"
    mode: str = "gen"
    latent_steps: int | None = None
    context: str = "disc"
    multi_image: str | None = None
    batch_tokens: int | None = None
    disc_offset: int = 0

    @classmethod
    def recorded(cls, manifest: Manifest, device: str) -> EncodingOptions:
        """The options that make queries comparable with the embeddings of a store.

        Raises:
            UmeError: the manifest lacks a setting.
        """
        settings = manifest.encoding
        try:
            return cls(
                model=manifest.model,
                engine=settings["engine"],
                device=device,
                dtype=settings["dtype"],
                mode=settings["mode"],
                latent_steps=settings["latent_steps"],
                context=settings["context"],
                multi_image=settings["multi_image"],
                batch_tokens=settings["batch_tokens"],
                disc_offset=settings.get("disc_offset", 0),
            )
        except KeyError as error:
            raise UmeError(f"the manifest of the index lacks the setting {error}") from None


def load_model(options: EncodingOptions) -> Any:
    """The model of these options, ready to embed.

    Raises:
        UmeError: the checkpoint, the device or another option cannot be used.
    """
    chosen: dict[str, Any] = {
        "device": options.device,
        "dtype": options.dtype,
        "context": options.context,
        "engine": options.engine,
        "multi_image": options.multi_image,
    }
    if options.disc_offset:
        chosen["disc_offset"] = options.disc_offset
    if options.latent_steps is not None:
        chosen["latent_steps"] = options.latent_steps
    try:
        pick_device(options.device)
        return ume_models.load(None if options.model == BUNDLED else options.model, **chosen)
    except ValueError as error:  # an option the user chose, not a defect
        raise UmeError(str(error)) from error


def describe_run(
    model: Any,
    options: EncodingOptions,
    items: ItemsFile,
    output: Path,
    shard_size: int,
) -> Manifest:
    """The manifest of embedding ``items`` with a loaded model into the folder ``output``."""
    return Manifest(
        package_version=ume_models.__version__,
        model=_lasting_name(options.model),
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        encoding=encode.encoding_settings(model, options.mode, options.batch_tokens),
        items_digest=items.digest,
        num_items=len(items),
        shard_size=shard_size,
        media_folders=_media_folders(items.folder, output.absolute()),
    )


def embed_rows(
    model: Any,
    options: EncodingOptions,
    items: ItemsFile,
    rows: Iterable[int],
    *,
    on_error: Literal["stop", "skip"],
    workers: int,
    progress: Progress | None = None,
) -> Shard:
    """Embed some rows of a file.

    Args:
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
        chosen: dict[str, Any] = {
            "mode": options.mode,
            "batch_tokens": options.batch_tokens,
            "workers": workers,
            "progress": progress,
            "on_error": "raise" if on_error == "stop" else "skip",
        }
        try:
            output = encode.encode_detailed(model, [entry.item for entry in usable], **chosen)
        except ItemError as error:
            if error.index is None:
                raise
            row = usable[error.index].row
            hint = " (here: --multi-image all|first)" if "multi_image=" in error.reason else ""
            raise UmeError(f"{items.where(row)}: {error.reason}{hint}") from error
        embeddings = output.embeddings.cpu()
        for problem in output.errors:
            if problem.index is not None:  # encode_detailed always tells it
                row = usable[problem.index].row
                if on_error == "stop":
                    raise UmeError(f"{items.where(row)}: {problem.reason}")
                problems[row] = problem.reason
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
