"""From the options of a command to a loaded model, and from rows of a file to a shard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

import ume_models
from ume_models import encode
from ume_models.commands.items_file import ItemsFile
from ume_models.embedder import Embedder
from ume_models.embedders.base import BackboneEmbedder
from ume_models.embedders.loading import pick_device
from ume_models.embedders.registry import family_class
from ume_models.errors import ErrorKind, ItemError, UmeError
from ume_models.store import Manifest, Shard, Skipped, under_profile

BUNDLED = "bundled"
Progress = Callable[[int, int], None]
Empty: TypeAlias = Literal["error", "reference"]


@dataclass(frozen=True)
class EncodingOptions:
    """How items are embedded.

    Attributes:
        model: checkpoint folder or name, or ``BUNDLED``.
        engine, device, dtype, family, profile, multi_image: as ``ume_models.load`` takes them.
        batch_tokens: tokens per batch, None for the default.
        options: the family's own; what is not there is left to the model.
    """

    model: str = BUNDLED
    engine: str = "fast"
    device: str = "auto"
    dtype: str = "auto"
    family: str | None = None
    profile: str | None = None
    multi_image: str | None = None
    batch_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def recorded(cls, manifest: Manifest, device: str) -> EncodingOptions:
        """The options that make queries comparable with the embeddings of a store.

        Raises:
            UmeError: the manifest lacks a setting, or is of a family that is not known here.
        """
        settings = under_profile(manifest.encoding)
        try:
            names = family_class(settings["embedder"]).Options.names()
            return cls(
                model=manifest.model,
                engine=settings["engine"],
                device=device,
                dtype=settings["dtype"],
                family=settings["embedder"],
                profile=settings["profile"],
                multi_image=settings["multi_image"],
                batch_tokens=settings["batch_tokens"],
                options={name: settings[name] for name in names if name in settings},
            )
        except KeyError as error:
            raise UmeError(f"the manifest of the index lacks the setting {error}") from None
        except ValueError as error:
            raise UmeError(f"the manifest of the index: {error}; update ume") from None


def load_model(options: EncodingOptions, *, empty: Empty = "error") -> BackboneEmbedder:
    """The model of these options, ready to embed; ``empty`` is as ``ume_models.load`` takes it.

    Raises:
        UmeError: the checkpoint, the device or another option cannot be used.
    """
    chosen = {
        name: getattr(options, name)
        for name in ("device", "dtype", "family", "profile", "engine", "multi_image")
    }
    path = None if options.model == BUNDLED else options.model
    pick_device(options.device)
    return ume_models.load(path, **chosen, empty=empty, **options.options)


def describe_run(
    model: Embedder,
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
    on_error: Literal["stop", "skip"],
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
                progress=progress,
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
                row = usable[problem.index].row
                if on_error == "stop":
                    raise UmeError(f"{items.where(row)}: {problem.reason}", kind=problem.kind)
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
