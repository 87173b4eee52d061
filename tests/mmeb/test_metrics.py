"""Ranking measures against trec_eval, the official definitions as plain loops, and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_models.mmeb.metrics import (
    MEASURES,
    Ranking,
    decided_by_ties,
    metric_values,
    query_values,
    split_metric,
)

KS = (1, 3, 5, 10)


def ranking(
    prediction: Sequence[str],
    relevant: Sequence[str],
    grades: Sequence[float] | None = None,
    scores: Sequence[float] = (),
    labels: Sequence[str | int] = (),
) -> Ranking:
    graded = None if grades is None else tuple(grades)
    return Ranking("q", tuple(prediction), tuple(scores), tuple(relevant), graded, tuple(labels))


@st.composite
def rankings(draw: st.DrawFn, graded: bool | None = None) -> list[Ranking]:
    """Queries with 1 to 6 answers among 8 candidates or outside of them, numbered names."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(range(8)))
        prediction = tuple(str(place) for place in order[: draw(st.integers(1, 8))])
        # Numbers this far apart do not stand in a set in the order of their size.
        labels = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True))
        with_grades = draw(st.booleans()) if graded is None else graded
        grade = st.lists(st.integers(1, 3), min_size=len(labels), max_size=len(labels))
        grades = tuple(float(value) for value in draw(grade)) if with_grades else None
        relevant = tuple(map(str, labels))
        found.append(Ranking(f"q{number}", prediction, (), relevant, grades, tuple(labels)))
    return found


def test_a_case_worked_out_by_hand() -> None:
    """Hits at ranks 2 and 4, three relevant candidates, one of them not retrieved."""
    values = metric_values([ranking("abcdef", "bdz")], ks=(1, 2, 5))
    expected = {
        "hit@1": 0, "hit@2": 1, "hit@5": 1,
        "precision@1": 0, "precision@2": 1 / 2, "precision@5": 2 / 5,
        "recall@1": 0, "recall@2": 1 / 3, "recall@5": 2 / 3,
        "f1@1": 0, "f1@2": 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3), "f1@5": 1 / 2,
        "mrr@1": 0, "mrr@2": 1 / 2, "mrr@5": 1 / 2,
        # normalised by min(3, k)
        "map@1": 0, "map@2": (1 / 2) / 2, "map@5": (1 / 2 + 2 / 4) / 3,
        "ndcg_linear@1": 0,
        "ndcg_linear@2": (1 / math.log2(3)) / (1 + 1 / math.log2(3)),
        "ndcg_linear@5": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / 2),
    }  # fmt: skip
    assert {name: values[name][0] for name in expected} == pytest.approx(expected)
    assert set(values) == {f"{measure}@{k}" for measure in MEASURES for k in (1, 2, 5)}
    assert all(value.dtype == np.float64 and value.shape == (1,) for value in values.values())


def test_graded_relevance_by_hand() -> None:
    """Grades 1, 3, 2: found are the 2 at rank 1 and the 1 at rank 3."""
    values = metric_values([ranking("cxa", "abc", (1, 3, 2))], ks=(3,))
    assert values["ndcg_linear@3"][0] == pytest.approx((2 + 1 / 2) / (3 + 2 / math.log2(3) + 1 / 2))
    assert values["ndcg_exponential@3"][0] == pytest.approx(
        (3 + 1 / 2) / (7 + 3 / math.log2(3) + 1 / 2)
    )
    assert values["hit@3"][0] == 1


def test_the_official_pairing_by_hand() -> None:
    """A set of 17, 3 and 8 is walked in the order 8, 17, 3 (places 0, 1, 3 of 8).

    So the official metric gives the grades 3, 2, 1 to 8, 17, 3 rather than to 17, 3, 8.
    """
    query = ranking(("8", "x"), ("17", "3", "8"), (3, 2, 1), labels=(17, 3, 8))
    assert query.gains() == {"17": 3, "3": 2, "8": 1}
    assert query.gains(legacy=True) == {"8": 3, "17": 2, "3": 1}
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert query_values([query], "ndcg_linear@5")[0] == pytest.approx(1 / ideal)
    assert query_values([query], "ndcg_linear@5", legacy=True)[0] == pytest.approx(3 / ideal)


@settings(max_examples=60, deadline=None)
@given(found=rankings())
def test_equal_to_trec_eval(found: list[Ranking]) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="trec_eval's measures are not here")
    wanted = {query.id: {n: int(g) for n, g in query.gains().items()} for query in found}
    run = {
        query.id: {name: 1.0 - place / 16 for place, name in enumerate(query.prediction)}
        for query in found
    }
    ks = ",".join(map(str, KS))
    measures = {f"{name}.{ks}" for name in ("ndcg_cut", "recall", "P", "map_cut", "success")}
    result = pytrec_eval.RelevanceEvaluator(wanted, measures | {"recip_rank"}).evaluate(run)
    values = metric_values(found, ks=KS)
    for row, query in enumerate(found):
        theirs, n = result[query.id], len(query.relevant)
        assert values["mrr@10"][row] == pytest.approx(theirs["recip_rank"])
        for k in KS:
            mine = {name: values[f"{name}@{k}"][row] for name in MEASURES}
            assert mine["ndcg_linear"] == pytest.approx(theirs[f"ndcg_cut_{k}"])
            assert mine["recall"] == pytest.approx(theirs[f"recall_{k}"])
            assert mine["precision"] == pytest.approx(theirs[f"P_{k}"])
            # trec_eval divides by all relevant candidates, the official code by min(those, k)
            assert mine["map"] == pytest.approx(theirs[f"map_cut_{k}"] * n / min(n, k))
            assert mine["hit"] == theirs[f"success_{k}"]


def official_values(query: Ranking, k: int, legacy: bool) -> dict[str, float]:
    """The official definitions, one query, one k, step by step.

    What the official code is given: labels and predictions of one kind, grades of the labels in
    the order of the tables. It takes the labels through a set before it pairs them.
    """
    name_of = dict(zip(query.labels, query.relevant, strict=True))
    labels = [name_of[label] for label in list(set(query.labels))] if legacy else query.relevant
    first = query.prediction[:k]
    grade_of = dict.fromkeys(labels, 1.0)
    if query.grades is not None:
        for label, grade in zip(labels, query.grades, strict=True):
            grade_of[label] = grade
    hits, precisions, reciprocal = 0, 0.0, 0.0
    gain, exponential = 0.0, 0.0
    for place, name in enumerate(first):
        if name in labels:
            hits += 1
            precisions += hits / (place + 1)
            reciprocal = reciprocal or 1 / (place + 1)
            gain += grade_of[name] / math.log2(place + 2)
            exponential += (2 ** grade_of[name] - 1) / math.log2(place + 2)
    best, best_exponential = 0.0, 0.0
    for place, grade in enumerate(sorted(grade_of.values(), reverse=True)[:k]):
        best += grade / math.log2(place + 2)
        best_exponential += (2**grade - 1) / math.log2(place + 2)
    precision, recall = hits / k, hits / len(labels)
    return {
        "hit": 1.0 if hits else 0.0,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "map": precisions / min(len(labels), k),
        "mrr": reciprocal,
        "ndcg_linear": gain / best,
        "ndcg_exponential": exponential / best_exponential,
    }


@settings(max_examples=80, deadline=None)
@given(found=rankings(), legacy=st.booleans(), words=st.booleans())
def test_equal_to_the_official_definitions(found: list[Ranking], legacy: bool, words: bool) -> None:
    if words:  # the labels of most tables are strings; their order in sets is the process's own
        found = [ranking(q.prediction, q.relevant, q.grades, labels=q.relevant) for q in found]
    values = metric_values(found, ks=KS, legacy=legacy)
    for (row, query), k in itertools.product(enumerate(found), KS):
        mine = {name: values[f"{name}@{k}"][row] for name in MEASURES}
        assert mine == pytest.approx(official_values(query, k, legacy), abs=1e-12)


def test_a_name_predicted_twice_counts_once() -> None:
    once, twice = ranking("abc", "ac"), ranking("aabbc", "ac")
    np.testing.assert_equal(metric_values([twice], ks=KS), metric_values([once], ks=KS))


def test_a_query_without_answers_follows_the_official_conventions() -> None:
    values = metric_values([ranking("abc", "")], ks=(2,))
    assert values.pop("recall@2")[0] == 1
    assert all(value[0] == 0 for value in values.values())


def test_no_queries_have_no_values() -> None:
    assert all(value.shape == (0,) for value in metric_values([]).values())


@pytest.mark.parametrize(
    ("scores", "relevant", "metric", "decided"),
    [
        ((3, 2, 1, 0), "a", "hit@1", False),
        ((3, 3, 1, 0), "a", "hit@1", True),
        ((3, 3, 1, 0), "b", "hit@1", True),
        ((3, 3, 1, 0), "c", "hit@1", False),  # the best two are both wrong
        ((3, 3, 1, 0), "ab", "hit@1", False),  # both right
        ((3, 3, 3, 0), "c", "hit@1", True),  # the third could have come first
        ((3, 2, 2, 0), "b", "hit@1", False),  # behind the place that counts
        ((3, 2, 2, 0), "b", "ndcg_linear@2", True),
        ((3, 2, 2, 0), "b", "recall@3", False),  # in whichever order, within the first three
        ((), "a", "hit@1", False),
    ],
)
def test_ties_that_decide(
    scores: tuple[float, ...], relevant: str, metric: str, decided: bool
) -> None:
    assert decided_by_ties([ranking("abcd", relevant, scores=scores)], metric)[0] == decided


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=2, max_size=5),
    grades=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    metric=st.sampled_from(("hit@1", "ndcg_linear@2", "recall@2", "mrr@3", "map@3")),
)
def test_ties_are_those_that_some_order_changes(
    scores: list[int], grades: list[int], metric: str
) -> None:
    """Against every order of the candidates that the scores allow."""
    scores.sort(reverse=True)
    names, relevant = "vwxyz"[: len(scores)], "zwv"[: len(grades)]
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if [scores[place] for place in order] == scores
    ]
    variants = [ranking([names[place] for place in order], relevant, grades) for order in orders]
    values = np.round(query_values(variants, metric), 12)
    decided = decided_by_ties([ranking(names, relevant, grades, scores)], metric)
    assert decided[0] == (len(set(values)) > 1)


@pytest.mark.parametrize("metric", ["hit", "hit@", "hit@0", "hit@x", "ndcg@5", "@1"])
def test_unknown_metrics_are_refused(metric: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        split_metric(metric)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 scores for 2"):
        ranking("ab", "a", scores=(1,))
    with pytest.raises(ValueError, match="1 grades for 2"):
        ranking("ab", "ab", (1,))
    with pytest.raises(ValueError, match="1 labels for 2"):
        ranking("ab", "ab", (1, 2), labels=(7,))
    with pytest.raises(ValueError, match="1 different relevant names for 2"):
        ranking("ab", "aa")
    with pytest.raises(ValueError, match="positive"):
        metric_values([], ks=(0,))
