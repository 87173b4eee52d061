"""Embeddings with their ids: the checks, the files and the id look-up every index shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from ume_models.atomic import write_atomically
from ume_models.errors import StoreError

_FORMAT = "ume-index"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class EmbeddingTable:
    """Candidates of an index.

    Attributes:
        embeddings: float32, float16 or bfloat16 ``[N, D]``, finite.
        ids: N ids, in the order of the rows.
    """

    embeddings: torch.Tensor
    ids: Sequence[str]

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        if self.embeddings.ndim != 2 or 0 in shape:
            raise ValueError(f"embeddings must be a non-empty matrix, got shape {shape}")
        if len(self.ids) != shape[0]:
            raise ValueError(f"{len(self.ids)} ids for {shape[0]} embeddings: they must agree")
        finite = self.embeddings.isfinite().all(dim=1)
        if not bool(finite.all()):
            row = int(finite.logical_not().nonzero()[0, 0])
            raise ValueError(
                f"the embedding of {self.ids[row]!r} (row {row}) is not finite: "
                "drop the rows of skipped items first"
            )

    def check_queries(self, queries: torch.Tensor, k: int) -> None:
        """Raise ValueError unless ``queries`` is finite ``[Q, D]`` and ``1 <= k <= N``."""
        rows, columns = self.embeddings.shape
        if queries.ndim != 2 or queries.shape[1] != columns:
            raise ValueError(
                f"queries must be [Q, {columns}] like the index, got {tuple(queries.shape)}"
            )
        if not 1 <= k <= rows:
            raise ValueError(f"k is {k}, but must be 1 … {rows} (the size of the index)")
        if not bool(queries.isfinite().all()):
            raise ValueError("the queries hold NaN or infinity: drop the rows of skipped items")

    def look_up(self, rows: torch.Tensor) -> list[list[str]]:
        """Ids of a matrix of rows."""
        return [[self.ids[row] for row in line] for line in rows.tolist()]

    def save(self, directory: str | Path, kind: str, **settings: Any) -> None:
        """Write ``index.json`` and ``index.safetensors``, each atomically, the tensors last."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        value = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "type": kind,
            "settings": settings,
            "ids": list(self.ids),
        }
        text = json.dumps(value, ensure_ascii=False) + "\n"
        write_atomically(directory / "index.json", text.encode(errors="surrogatepass"))
        write_atomically(
            directory / "index.safetensors",
            tensors_to_bytes({"embeddings": self.embeddings.detach().cpu().contiguous()}),
        )

    @classmethod
    def load(cls, directory: str | Path, kind: str) -> tuple[EmbeddingTable, Mapping[str, Any]]:
        """Table and settings of a saved index.

        Raises:
            StoreError: a file is damaged or of another kind of index.
            OSError: a file is missing.
        """
        path = Path(directory) / "index.json"
        try:
            value = json.loads(path.read_bytes())
            if value["format"] != _FORMAT or value["format_version"] != _FORMAT_VERSION:
                raise ValueError("unknown format")
            found, settings, ids = value["type"], dict(value["settings"]), list(value["ids"])
            tensors = path.with_suffix(".safetensors").read_bytes()
            table = cls(tensors_from_bytes(tensors)["embeddings"], ids)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreError(f"{directory} is not a readable index: {error}") from error
        if found != kind:
            raise StoreError(f"{directory} is an index of type {found!r}, not {kind!r}")
        return table, settings
