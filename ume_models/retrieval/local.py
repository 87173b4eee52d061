"""Local ranking: each query against its own list of candidates, as evaluators ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_models.retrieval.embedding_table import listed
from ume_models.retrieval.protocol import Index, SearchResult


def local_search(
    index: Index, queries: torch.Tensor, candidates: Sequence[Sequence[str]], top: int
) -> SearchResult:
    """The best candidates of every query's own list.

    One search for all queries. Equal scores keep the order of the index; an id that a list names
    twice is ranked once.

    Args:
        index: what holds the candidates.
        queries: ``[Q, D]``.
        candidates: Q lists of ids of the index; any may be empty.
        top: results per query, at most.

    Raises:
        ValueError: as ``ExactIndex.search``.
    """
    lists = [listed(ids) for ids in candidates]
    longest = max((len(set(ids)) for ids in lists), default=0)
    k = max(1, min(longest, len(index), top))
    return index.search(queries, k, candidates=lists)
