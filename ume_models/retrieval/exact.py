"""Exact search: every candidate is scored; equal scores keep the order of the candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ume_kernels import explain
from ume_kernels.similarity_topk import similarity_topk
from ume_models.retrieval.embedding_table import EmbeddingTable, listed
from ume_models.retrieval.protocol import SearchResult


class ExactIndex:
    """Brute-force inner-product search.

    The embeddings keep their dtype. They lie in memory, in the memory of a CUDA device (``to``),
    or in a file (``load(..., mapped=True)``), from which they are read block by block. Queries on
    a CUDA device search an index in CPU memory or in a file there, streaming it through.

    Args:
        embeddings: ``[N, D]`` float32, float16 or bfloat16; scores are float32.
        ids: N ids, in any sequence.
        duplicates: ``"keep"`` lets an id stand for several rows.
        device: where the embeddings go; None leaves them where they are.

    Raises:
        ValueError: the sizes do not agree, an id stands twice or an embedding is not finite.
    """

    kind = "exact"

    def __init__(
        self,
        embeddings: torch.Tensor,
        ids: Iterable[str],
        *,
        duplicates: Literal["refuse", "keep"] = "refuse",
        device: str | torch.device | None = None,
    ) -> None:
        found = embeddings if device is None else embeddings.to(device)
        self._table = EmbeddingTable(found, listed(ids), duplicates=duplicates)

    def __len__(self) -> int:
        return len(self._table.ids)

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the candidates, by row."""
        return self._table.ids

    @property
    def dim(self) -> int:
        """Columns D of the embeddings."""
        return self._table.embeddings.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the embeddings are; the CPU for those in a file."""
        return self._table.embeddings.device

    @property
    def description(self) -> str:
        """What searches, in a few words."""
        embeddings = self._table.embeddings
        backend = explain("similarity_topk", embeddings[:1], embeddings).backend
        return f"exact, {backend} backend"

    def to(self, device: str | torch.device) -> ExactIndex:
        """The same index with its embeddings in the memory of ``device``."""
        embeddings = self._table.embeddings.to(device)
        return type(self)(embeddings, self._table.ids, duplicates="keep")

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: torch.Tensor | None = None,
        candidates: Sequence[Sequence[str]] | None = None,
    ) -> SearchResult:
        """The ``k`` candidates with the largest inner product for each query.

        Args:
            queries: ``[Q, D]``, any floating dtype. They go to the device of the index,
                unless they are on a CUDA device and the index is not: then it comes to them.
            k: results per query, ``1 <= k <= N``.
            allowed: bool ``[N]`` or ``[Q, N]``: the rows that may be returned.
            candidates: one list of ids per query, the only ones it ranks; an id must stand for
                one row.

        Returns:
            Scores and rows on the device of the search; see ``SearchResult`` for queries with
            fewer than ``k`` candidates.

        Raises:
            ValueError: a shape does not fit, ``k`` is out of range, a query is not finite, or a
                candidate is unknown or ambiguous.
        """
        return search_table(self._table, queries, k, allowed, candidates)

    def save(self, directory: str | Path) -> None:
        """Write ``index.json`` and ``index.safetensors`` into ``directory``."""
        self._table.save(directory, self.kind)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        mapped: bool = False,
        device: str | torch.device | None = None,
    ) -> ExactIndex:
        """Read what ``save`` wrote.

        Args:
            directory: where it was written.
            mapped: leave the embeddings in the file, which may be larger than the memory, and read
                it at every search.
            device: where the embeddings go, as in the constructor.

        Raises:
            StoreError: a file is damaged or of another kind of index.
            ValueError: ``mapped`` and a device that is not the CPU.
        """
        if mapped and device is not None and torch.device(device).type != "cpu":
            raise ValueError("an index stays in its file or goes to a device, not both")
        table, _ = EmbeddingTable.load(directory, cls.kind, mapped=mapped)
        if not mapped:
            return cls(table.embeddings, table.ids, duplicates="keep", device=device)
        index = cls.__new__(cls)
        index._table = table
        return index


class _FileRows:
    """Embeddings in a file, as what ``similarity_topk`` reads ahead in a thread of its own."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        self._embeddings = embeddings
        self.shape = embeddings.shape
        self.dtype = embeddings.dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._embeddings[rows]


def search_table(
    table: EmbeddingTable,
    queries: torch.Tensor,
    k: int,
    allowed: torch.Tensor | None,
    candidates: Sequence[Sequence[str]] | None,
) -> SearchResult:
    """Exact search of a table; arguments and errors as ``ExactIndex.search``."""
    queries, k = table.check_queries(queries, k)
    embeddings = table.embeddings
    if not (queries.is_cuda and embeddings.device.type == "cpu"):
        queries = queries.to(embeddings.device)
    corpus: Any = _FileRows(embeddings) if table.mapped else embeddings
    segments = None if candidates is None else table.segments(candidates, queries.shape[0])
    scores, rows = similarity_topk(queries, corpus, k, segments=segments, allowed=allowed)
    return SearchResult(scores, rows, table.look_up(rows))
