"""How alike two runs are where scores do not show it: their rankings and their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_OVERLAP = 10
_DEPTH = 100  # of rankings whose order is compared: its cost grows with the square
_ROWS = 4096  # embeddings compared at once, so that memory stays bounded


@dataclass(frozen=True)
class RankAgreement:
    """How alike the rankings of the same queries are, on average.

    Attributes:
        top_1: share of queries with the same best candidate.
        overlap_10: mean share of the first ten that the two have in common.
        kendall_tau: mean of Kendall's tau over the candidates that both rankings of a query have
            among their first 100: 1 for the same order, −1 for the opposite; None where no query
            has two of them.
    """

    top_1: float
    overlap_10: float
    kendall_tau: float | None


@dataclass(frozen=True)
class CosineDistribution:
    """Cosines between the embeddings of the same items.

    Attributes:
        items: how many there were.
        minimum: the smallest.
        p1: first percentile.
        median: median.
        mean: mean.
    """

    items: int
    minimum: float
    p1: float
    median: float
    mean: float


def rank_agreement(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> RankAgreement:
    """Compare rankings of the same queries.

    Args:
        a: names, best first, for each query.
        b: the same of the other run; the lists may be cut at other lengths.

    Raises:
        ValueError: there are no queries, or not equally many.
    """
    pairs = list(zip(a, b, strict=True))
    if not pairs:
        raise ValueError("rankings of no queries cannot be compared")
    orders = [kendall_tau(one[:_DEPTH], other[:_DEPTH]) for one, other in pairs]
    taus = [tau for tau in orders if tau is not None]
    return RankAgreement(
        top_1=float(np.mean([list(one[:1]) == list(other[:1]) for one, other in pairs])),
        overlap_10=float(np.mean([_overlap(one, other) for one, other in pairs])),
        kendall_tau=float(np.mean(taus)) if taus else None,
    )


def kendall_tau(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Kendall's tau of two orders, over the names that both hold; None for fewer than two.

    (pairs in the same order − pairs in the opposite one) / pairs.
    """
    rank = {name: position for position, name in enumerate(b)}
    ranks = np.array([rank[name] for name in a if name in rank], dtype=np.int64)
    count = len(ranks)
    if count < 2:
        return None
    above, below = np.triu_indices(count, 1)
    return float(np.sign(ranks[below] - ranks[above]).mean())


def paired_cosines(
    a: Any, b: Any, rows_a: Sequence[int], rows_b: Sequence[int]
) -> CosineDistribution | None:
    """Cosines of row ``rows_a[i]`` of ``a`` with row ``rows_b[i]`` of ``b``.

    Args:
        a: ``[N, D]``, a tensor on the CPU or an array.
        b: ``[M, D]``.
        rows_a: n positions.
        rows_b: n positions.

    Returns:
        Their distribution, computed in float64; None where there are no rows, or the two have
        different numbers of columns and cannot be compared. A zero row has cosine 0.
    """
    left, right = np.asarray(a), np.asarray(b)
    if not len(rows_a) or left.shape[1] != right.shape[1]:
        return None
    cosines = np.concatenate(
        [
            _cosines(
                left[rows_a[start : start + _ROWS]].astype(np.float64),
                right[rows_b[start : start + _ROWS]].astype(np.float64),
            )
            for start in range(0, len(rows_a), _ROWS)
        ]
    )
    return CosineDistribution(
        items=len(cosines),
        minimum=float(cosines.min()),
        p1=float(np.quantile(cosines, 0.01)),
        median=float(np.median(cosines)),
        mean=float(cosines.mean()),
    )


def _cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide(np.sum(a * b, axis=1), norms, out=np.zeros_like(norms), where=norms > 0)


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    first_a, first_b = {*a[:_OVERLAP]}, {*b[:_OVERLAP]}
    longest = max(len(first_a), len(first_b))
    return len(first_a & first_b) / longest if longest else 1.0
