"""What every index offers: search by inner product, save and load without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class SearchResult:
    """The best candidates of each query, best first.

    Attributes:
        scores: float32 ``[Q, k]``, inner products; −inf where a query has fewer candidates.
        rows: int64 ``[Q, k]``, positions of the candidates in the index; −1 there.
        ids: Q lists of at most k candidate ids.
    """

    scores: torch.Tensor
    rows: torch.Tensor
    ids: list[list[str]]


@runtime_checkable
class Index(Protocol):
    """A searchable set of embeddings with ids."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the candidates, by row."""
        ...

    @property
    def dim(self) -> int:
        """Columns D of the embeddings."""
        ...

    @property
    def description(self) -> str:
        """What searches, in a few words."""
        ...

    def __len__(self) -> int: ...

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: torch.Tensor | None = None,
        candidates: Sequence[Sequence[str]] | None = None,
    ) -> SearchResult:
        """The ``k`` candidates with the largest inner product for each query ``[Q, D]``.

        Only those ``allowed``, bool ``[N]`` or ``[Q, N]`` by row; only the ``candidates`` of each
        query, by id.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Write the index as safetensors and JSON."""
        ...
