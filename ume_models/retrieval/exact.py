"""Exact search: every candidate is scored; equal scores keep the order of the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ume_kernels.similarity_topk import similarity_topk
from ume_models.retrieval.embedding_table import EmbeddingTable
from ume_models.retrieval.protocol import SearchResult


class ExactIndex:
    """Brute-force inner-product search over embeddings kept in memory.

    Args:
        embeddings: ``[N, D]`` float32, float16 or bfloat16; scores are float32.
        ids: N ids.

    Raises:
        ValueError: the sizes do not agree or an embedding is not finite.
    """

    kind = "exact"

    def __init__(self, embeddings: torch.Tensor, ids: Sequence[str]) -> None:
        self._table = EmbeddingTable(embeddings, ids)

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

    def search(self, queries: torch.Tensor, k: int) -> SearchResult:
        """The ``k`` candidates with the largest inner product for each query.

        Args:
            queries: ``[Q, D]``, any of the three dtypes; moved to the device of the index.
            k: results per query, ``1 <= k <= N``.

        Raises:
            ValueError: a shape does not fit, ``k`` is out of range, or a query is not finite.
        """
        self._table.check_queries(queries, k)
        embeddings = self._table.embeddings
        scores, rows = similarity_topk(queries.to(embeddings.device), embeddings, k)
        return SearchResult(scores, rows, self._table.look_up(rows))

    def save(self, directory: str | Path) -> None:
        """Write ``index.json`` and ``index.safetensors`` into ``directory``."""
        self._table.save(directory, self.kind)

    @classmethod
    def load(cls, directory: str | Path) -> ExactIndex:
        """Read what ``save`` wrote.

        Raises:
            StoreError: a file is damaged or of another kind of index.
        """
        table, _ = EmbeddingTable.load(directory, cls.kind)
        return cls(table.embeddings, table.ids)
