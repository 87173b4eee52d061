"""Ranking measures against scikit-learn and against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ume_models.retrieval import ranking_quality


def test_a_case_worked_out_by_hand() -> None:
    rankings = [list("abcdef"), list("bcdefa"), list("fedcba")]
    quality = ranking_quality(rankings, [{"a"}, {"a", "e"}, {"x"}], candidates=6)
    assert quality.hit_at_1 == pytest.approx(1 / 3)
    assert quality.hit_at_5 == pytest.approx(2 / 3)  # "e" is fourth
    assert quality.mrr == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert quality.chance == pytest.approx((1 / 6 + 2 / 6 + 1 / 6) / 3)
    assert (quality.queries, quality.candidates) == (3, 6)


@given(seed=st.integers(0, 10_000), queries=st.integers(1, 8), candidates=st.integers(2, 12))
def test_mrr_is_scikit_learns(seed: int, queries: int, candidates: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(candidates), (queries, 1)), axis=1)
    wanted = rng.integers(0, candidates, queries)
    rankings = [[str(column) for column in np.argsort(-row)] for row in scores]
    quality = ranking_quality(rankings, [{str(column)} for column in wanted], candidates)
    truth = np.eye(candidates)[wanted]
    # With one relevant candidate, label ranking average precision is the reciprocal rank.
    expected = metrics.label_ranking_average_precision_score(truth, scores)
    assert quality.mrr == pytest.approx(expected)
    assert quality.hit_at_1 == pytest.approx(
        metrics.top_k_accuracy_score(wanted, scores, k=1, labels=np.arange(candidates))
        if candidates > 2
        else np.mean(scores.argmax(axis=1) == wanted)
    )


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ranking_quality([], [], 3)
    with pytest.raises(ValueError, match="at least one relevant"):
        ranking_quality([["a"]], [set()], 3)


def test_ids_of_numpy_and_one_text_for_a_list() -> None:
    rankings, relevant = np.array([["ab", "c"]]), np.array([["c"]])
    assert ranking_quality(rankings, relevant, 2).mrr == 0.5  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list of ids"):
        ranking_quality([["a", "c"]], ["abc"], 2)
