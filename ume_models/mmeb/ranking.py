"""Embeddings to rankings: every query against its own list, or against all candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.tasks import Task
from ume_models.retrieval import ExactIndex, SearchResult, local_search

_QUERIES_AT_ONCE = 4096


def rank_task(
    task: Task,
    queries: Sequence[Query],
    query_rows: torch.Tensor,
    names: Sequence[str],
    candidate_rows: torch.Tensor,
    *,
    top: int = 100,
    device: str | torch.device = "cpu",
) -> list[Ranking]:
    """Rank the candidates of a task for each of its queries by inner product.

    Equal scores keep the order of the candidates, so that rankings do not depend on the machine.

    Args:
        task: says whether queries have lists of their own.
        queries: Q queries.
        query_rows: float ``[Q, D]``.
        names: C unique names.
        candidate_rows: float ``[C, D]``.
        top: how many places to keep.
        device: where to compute.

    Raises:
        DataError: the embeddings do not fit, one is not finite, or a list names an unknown
            candidate.
    """
    try:
        index = ExactIndex(candidate_rows, names, device=device)
        found: list[Ranking] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = queries[start : start + _QUERIES_AT_ONCE]
            rows = query_rows[start : start + len(part)].to(device)
            if task.ranking == "local":
                result = local_search(index, rows, [query.candidates for query in part], top)
            else:
                result = index.search(rows, min(top, len(index)))
            found += _rankings(part, result)
    except ValueError as error:
        raise DataError(f"{task.name}: {error}") from error
    return found


def _rankings(queries: Sequence[Query], result: SearchResult) -> list[Ranking]:
    scores = result.scores.cpu().tolist()
    return [
        Ranking(
            id=query.item.id,
            prediction=tuple(ids),
            scores=tuple(row[: len(ids)]),
            relevant=query.relevant,
            grades=query.grades,
            labels=query.labels,
        )
        for query, ids, row in zip(queries, result.ids, scores, strict=True)
    ]
