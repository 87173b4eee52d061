"""Ranking measures of MMEB per query, under the official names and definitions.

Source: ``RankingMetrics`` of VLM2Vec (``src/eval_utils/metrics.py``). For the first k of a ranking
with R relevant candidates, h hits among them, gain g_i at rank i (the grade, or 1):

    hit@k        1 if h > 0
    precision@k  h / k
    recall@k     h / R; 1 where R = 0
    f1@k         harmonic mean of the two
    map@k        sum of (hits up to i) / i over the ranks i of hits, divided by min(R, k)
                 (trec_eval's map_cut divides by R)
    mrr@k        1 / rank of the first hit
    ndcg_linear@k       DCG / DCG of the best possible order, DCG = sum of g_i / log2(i + 1)
    ndcg_exponential@k  the same with 2^g_i − 1 for g_i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

MEASURES = (
    "hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr",
)  # fmt: skip


@dataclass(frozen=True)
class Ranking:
    """What was found for one query, and what should have been.

    Attributes:
        id: id of the query.
        prediction: names of the candidates, best first, as many as the run keeps.
        scores: their inner products with the query, in the same order; empty where unknown.
        relevant: names of the candidates that answer the query, without repetition.
        grades: how relevant each of them is, in the same order; None where all count the same.
        labels: ``relevant`` as the tables have them, numbers where they are numbers;
            ``relevant`` itself where none are given.
    """

    id: str
    prediction: tuple[str, ...]
    scores: tuple[float, ...]
    relevant: tuple[str, ...]
    grades: tuple[float, ...] | None = None
    labels: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", self.relevant)
        for name, given, wanted in (
            ("scores", self.scores or self.prediction, self.prediction),
            ("grades", self.relevant if self.grades is None else self.grades, self.relevant),
            # Without grades nothing is paired with them, and tables may repeat a label.
            ("labels", self.relevant if self.grades is None else self.labels, self.relevant),
            ("different relevant names", set(self.relevant), self.relevant),
        ):
            if len(given) != len(wanted):
                raise ValueError(f"query {self.id!r}: {len(given)} {name} for {len(wanted)}")

    def gains(self, *, legacy: bool = False) -> dict[str, float]:
        """The gain of each relevant candidate: its grade, or 1.

        Args:
            legacy: give the grades to the labels in the order of a Python set of them, as the
                official metric does. That order is the same everywhere for numbers; for strings
                it changes with ``PYTHONHASHSEED``, so only a run with the official run's fixed
                seed reproduces its value.
        """
        if self.grades is None:
            return dict.fromkeys(self.relevant, 1.0)
        names: Sequence[str] = self.relevant
        if legacy:
            name_of = dict(zip(self.labels, self.relevant, strict=True))
            names = [name_of[label] for label in set(self.labels)]
        return dict(zip(names, self.grades, strict=True))


def split_metric(metric: str) -> tuple[str, int]:
    """Measure and k of a name such as "ndcg_linear@5".

    Raises:
        ValueError: it is not one of ``MEASURES`` with a positive k.
    """
    measure, _, k = metric.partition("@")
    if measure not in MEASURES or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"unknown metric {metric!r} (known: {', '.join(MEASURES)}, each @k)")
    return measure, int(k)


def metric_values(
    rankings: Sequence[Ranking], *, ks: Sequence[int] = (1, 5, 10), legacy: bool = False
) -> dict[str, npt.NDArray[np.float64]]:
    """Every measure of every query, under names such as "hit@1", each float64 ``[Q]``.

    A candidate that a prediction names twice counts at its first rank only.

    Args:
        rankings: one per query, Q of them, at least ``max(ks)`` deep unless there are fewer
            candidates.
        ks: how much of each ranking counts.
        legacy: see ``Ranking.gains``; only the nDCG of graded relevance depends on it.

    Raises:
        ValueError: ``ks`` is empty or holds a number below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive numbers, got {list(ks)}")
    depth = max(ks)
    gains, ideal = np.zeros((2, len(rankings), depth))
    hit = np.zeros((len(rankings), depth))
    relevant = np.array([len(ranking.relevant) for ranking in rankings], dtype=np.float64)
    for row, ranking in enumerate(rankings):
        gain_of = ranking.gains(legacy=legacy)
        best = sorted(gain_of.values(), reverse=True)[:depth]
        ideal[row, : len(best)] = best
        for column, name in enumerate(list(dict.fromkeys(ranking.prediction))[:depth]):
            if name in gain_of:
                hit[row, column] = 1.0
                gains[row, column] = gain_of[name]

    ranks = np.arange(1, depth + 1)
    discount = 1.0 / np.log2(ranks + 1.0)
    hits = hit.cumsum(axis=1)
    cumulative = {
        "ndcg_linear": _ratio((gains * discount).cumsum(1), (ideal * discount).cumsum(1)),
        "ndcg_exponential": _ratio(
            ((2.0**gains - 1.0) * discount).cumsum(1), ((2.0**ideal - 1.0) * discount).cumsum(1)
        ),
        "precision": hits / ranks,
        "recall": np.where(relevant[:, None] > 0, _ratio(hits, relevant[:, None]), 1.0),
        "map": _ratio(
            (hit * hits / ranks).cumsum(1), np.minimum(relevant[:, None], ranks[None, :])
        ),
        "hit": (hits > 0).astype(np.float64),
        "mrr": np.maximum.accumulate(hit / ranks, axis=1),
    }
    precision, recall = cumulative["precision"], cumulative["recall"]
    cumulative["f1"] = _ratio(2.0 * precision * recall, precision + recall)
    return {f"{name}@{k}": cumulative[name][:, k - 1].copy() for name in MEASURES for k in ks}


def query_values(
    rankings: Sequence[Ranking], metric: str, *, legacy: bool = False
) -> npt.NDArray[np.float64]:
    """One measure of every query, float64 ``[Q]``; arguments as ``metric_values``.

    Raises:
        ValueError: the metric is unknown.
    """
    _, k = split_metric(metric)
    return metric_values(rankings, ks=(k,), legacy=legacy)[metric]


def decided_by_ties(
    rankings: Sequence[Ranking], metric: str, *, legacy: bool = False
) -> npt.NDArray[np.bool_]:
    """Whether the value of a query depends on the order of candidates with equal scores, ``[Q]``.

    Where a relevant and another candidate have the same score, the order between them is nobody's
    merit: evaluations that sort differently differ there. Seen as far as the rankings reach.

    Args:
        rankings: with scores; one without them has no ties.
        metric: the measure whose value is meant.
        legacy: as in ``metric_values``.
    """
    split_metric(metric)
    decided = np.zeros(len(rankings), dtype=np.bool_)
    # Most rankings have no equal scores: only the others are worth ordering twice.
    rows = [
        row
        for row, ranking in enumerate(rankings)
        if any(one == other for one, other in zip(ranking.scores, ranking.scores[1:], strict=False))
    ]
    orders = [
        [_reordered(rankings[row], legacy=legacy, best_first=best_first) for row in rows]
        for best_first in (True, False)
    ]
    best, worst = (query_values(order, metric, legacy=legacy) for order in orders)
    decided[rows] = best != worst
    return decided


def _reordered(ranking: Ranking, *, legacy: bool, best_first: bool) -> Ranking:
    """The ranking with equal scores in the order of their gains."""
    gain_of = ranking.gains(legacy=legacy)
    sign = -1.0 if best_first else 1.0
    pairs = sorted(
        zip(ranking.scores, ranking.prediction, strict=True),
        key=lambda pair: (-pair[0], sign * gain_of.get(pair[1], 0.0)),
    )
    return replace(ranking, prediction=tuple(name for _, name in pairs))


def _ratio(
    above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Quotients, 0 where the divisor is 0."""
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
