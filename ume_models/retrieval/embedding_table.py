"""Embeddings with their ids: the checks, the files and the id look-up every index shares."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ume_models.atomic import replacing, write_atomically
from ume_models.errors import ErrorKind, StoreError
from ume_models.json_files import parse

_FORMAT = "ume-index"
_FORMAT_VERSION = 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHECKED_ROWS = 1 << 12


@dataclass(frozen=True)
class EmbeddingTable:
    """Candidates of an index.

    Attributes:
        embeddings: float32, float16 or bfloat16 ``[N, D]``, finite.
        ids: N ids, as ``listed`` makes them, in the order of the rows.
        duplicates: ``"keep"`` lets an id stand for several rows.
        mapped: the embeddings are pages of a file, not memory. They were checked when they were
            written; they are not read to check them again.
    """

    embeddings: torch.Tensor
    ids: Sequence[str]
    mapped: bool = False
    duplicates: Literal["refuse", "keep"] = "refuse"

    def __post_init__(self) -> None:
        _check_tensor("embeddings", self.embeddings)
        shape = tuple(self.embeddings.shape)
        if self.embeddings.ndim != 2 or 0 in shape:
            raise ValueError(f"embeddings must be a non-empty matrix, got shape {shape}")
        if self.embeddings.dtype not in DTYPES:
            raise ValueError(
                f"embeddings must be float32, float16 or bfloat16, got {self.embeddings.dtype}"
            )
        if len(self.ids) != shape[0]:
            raise ValueError(f"{len(self.ids)} ids for {shape[0]} embeddings: they must agree")
        if self.duplicates not in ("refuse", "keep"):
            raise ValueError(f"duplicates must be 'refuse' or 'keep', got {self.duplicates!r}")
        if self.duplicates == "refuse" and -1 in self._row_of.values():
            name = next(name for name, row in self._row_of.items() if row < 0)
            raise ValueError(
                f"the id {name!r} stands for several rows; ids must be unique, unless "
                "duplicates='keep'"
            )
        if self.mapped:
            return
        for start in range(0, shape[0], _CHECKED_ROWS):
            finite = self.embeddings[start : start + _CHECKED_ROWS].isfinite().all(dim=1)
            if not bool(finite.all()):
                row = start + int(finite.logical_not().nonzero()[0, 0])
                raise ValueError(
                    f"the embedding of {self.ids[row]!r} (row {row}) is not finite: "
                    "drop the rows of skipped items first"
                )

    def check_queries(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
        """Queries in a type that is searched, and ``k`` as Python's number.

        Raises:
            ValueError: ``queries`` is not finite ``[Q, D]``, or not ``1 <= k <= N``.
        """
        _check_tensor("queries", queries)
        rows, columns = self.embeddings.shape
        if queries.ndim != 2 or queries.shape[1] != columns:
            raise ValueError(
                f"queries must be [Q, {columns}] like the index, got {tuple(queries.shape)}"
            )
        k = operator.index(k)
        if not 1 <= k <= rows:
            raise ValueError(f"k is {k}, but must be 1 … {rows} (the size of the index)")
        if queries.dtype not in DTYPES:
            queries = queries.float()
        if not bool(queries.isfinite().all()):
            raise ValueError("the queries hold NaN or infinity: drop the rows of skipped items")
        return queries, k

    def look_up(self, rows: torch.Tensor) -> list[list[str]]:
        """Ids of a matrix of rows, without those of −1."""
        return [[self.ids[row] for row in line if row >= 0] for line in rows.tolist()]

    def segments(
        self, candidates: Sequence[Sequence[str]], queries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of ids as rows ``[E]`` and offsets ``[Q + 1]``; an id twice in a list counts once.

        Raises:
            ValueError: the number of lists is wrong, an id is not in the index, or it stands for
                several rows.
        """
        if len(candidates) != queries:
            raise ValueError(f"{len(candidates)} lists of candidates for {queries} queries")
        lists = [dict.fromkeys(listed(ids)) for ids in candidates]
        row_of = self._row_of
        for name in (name for ids in lists for name in ids):
            if row_of.get(name, -1) < 0:
                reason = "stands for several rows" if name in row_of else "is not in the index"
                raise ValueError(f"the candidate {name!r} {reason}")
        rows = torch.tensor([row_of[name] for ids in lists for name in ids], dtype=torch.int64)
        offsets = torch.tensor([0, *map(len, lists)], dtype=torch.int64).cumsum(0)
        return rows, offsets

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """Row of each id, −1 for an id of several rows."""
        rows: dict[str, int] = {}
        for row, name in enumerate(self.ids):
            rows[name] = -1 if name in rows else row
        return rows

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
        tensors = {"embeddings": self.embeddings.detach().cpu().contiguous()}
        # Straight to the file: it may be too large to be in memory a second time.
        with replacing(directory / "index.safetensors") as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(
        cls, directory: str | Path, kind: str, *, mapped: bool = False
    ) -> tuple[EmbeddingTable, Mapping[str, Any]]:
        """Table and settings of a saved index.

        Raises:
            StoreError: a file is damaged or of another kind of index.
            OSError: a file is missing.
        """
        path = Path(directory) / "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no index.json, which `save` of an index writes. A folder that "
                "`ume embed` wrote is read by `ume search` and by ume_models.store.EmbeddingStore"
            )
        try:
            value = parse(path.read_bytes())
            if value["format"] != _FORMAT or value["format_version"] != _FORMAT_VERSION:
                raise ValueError("unknown format")
            found, settings, ids = value["type"], dict(value["settings"]), listed(value["ids"])
            read = _mapped_tensor if mapped else _read_tensor
            # what `save` wrote was accepted once
            table = cls(read(path.with_suffix(".safetensors")), ids, mapped, "keep")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreError(f"{directory} is not a readable index: {error}") from error
        if found != kind:
            raise StoreError(
                f"{directory} is an index of type {found!r}, not {kind!r}",
                kind=ErrorKind.OTHER_SETTINGS,
            )
        return table, settings


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}: torch.as_tensor makes one"
        )


def listed(ids: Iterable[Any]) -> list[Any]:
    """Ids of any sequence or iterator by position, as a list of Python's own values.

    Raises:
        ValueError: it is one text, or an id is neither a text nor a whole number.
    """
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"ids must be a list of ids, got the text {ids!r}")
    found = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    scalar = (np.generic, torch.Tensor)
    found = [name.item() if isinstance(name, scalar) else name for name in found]
    wrong = next((row for row, name in enumerate(found) if not isinstance(name, (str, int))), None)
    if wrong is not None:
        raise ValueError(f"the id of row {wrong} is {found[wrong]!r}; ids are texts or integers")
    return found


def _read_tensor(path: Path) -> torch.Tensor:
    """The tensor of ``path``, read into its own memory and nowhere else."""
    tensor = torch.empty_like(_mapped_tensor(path))
    with path.open("rb") as file:
        file.seek(-tensor.nbytes, os.SEEK_END)
        content: Any = tensor.view(torch.uint8).numpy()
        file.readinto(content)
    return tensor


def _mapped_tensor(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        if [*file.keys()] != ["embeddings"]:
            raise ValueError(f"{path.name} holds {', '.join(file.keys())}, not embeddings alone")
        return file.get_tensor("embeddings")
