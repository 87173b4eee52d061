"""How well a ranking places what was looked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ume_models.retrieval.embedding_table import listed


@dataclass(frozen=True)
class RankingQuality:
    """Averages over the queries of a task.

    Attributes:
        queries: how many there were.
        candidates: candidates each was ranked against.
        hit_at_1: share of queries whose best result is relevant.
        hit_at_5: share with a relevant result among the best five.
        mrr: mean of 1 / rank of the best relevant result, 0 where none was retrieved.
        chance: expected ``hit_at_1`` of a random ranking: mean share of relevant candidates.
    """

    queries: int
    candidates: int
    hit_at_1: float
    hit_at_5: float
    mrr: float
    chance: float


def ranking_quality(
    rankings: Sequence[Sequence[str]],
    relevant: Sequence[Collection[str]],
    candidates: int,
) -> RankingQuality:
    """Score rankings (ids, best first) against the relevant ids of each query.

    Args:
        rankings: one list of ids per query; complete, or at least the best five.
        relevant: the ids that answer each query, in any collection; none may be empty.
        candidates: size of the collection that was ranked.

    Raises:
        ValueError: there are no queries, or the lists do not fit each other.
    """
    rankings = [listed(ids) for ids in rankings]
    relevant = [listed(ids) for ids in relevant]
    if not rankings or len(rankings) != len(relevant):
        raise ValueError(f"{len(rankings)} rankings and {len(relevant)} answers do not fit")
    if not all(relevant):
        raise ValueError("every query needs at least one relevant candidate")
    ranks = [best_rank(ids, wanted) for ids, wanted in zip(rankings, relevant, strict=True)]
    return RankingQuality(
        queries=len(ranks),
        candidates=candidates,
        hit_at_1=_mean([rank == 1 for rank in ranks]),
        hit_at_5=_mean([rank is not None and rank <= 5 for rank in ranks]),
        mrr=_mean([0.0 if rank is None else 1.0 / rank for rank in ranks]),
        chance=_mean([len(set(wanted)) / candidates for wanted in relevant]),
    )


def best_rank(ids: Sequence[str], wanted: Collection[str]) -> int | None:
    """Rank, from 1, of the first of ``ids`` that is wanted; None where none is."""
    return next((rank for rank, found in enumerate(ids, start=1) if found in wanted), None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
