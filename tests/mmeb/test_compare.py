"""Two runs side by side, against SciPy and against cases worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ume_models.errors import StoreError
from ume_models.mmeb.agreement import kendall_tau, paired_cosines, rank_agreement
from ume_models.mmeb.compare import Comparison, Setting, compare
from ume_models.mmeb.embeddings import task_embeddings
from ume_models.mmeb.intervals import holm, sign_flip_means, two_sided_p
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.results import RunFolder, score_task
from ume_models.mmeb.summary import Missing
from ume_models.mmeb.tasks import Source, Task

SOURCE = Source("someone/tables", None, "test")


def task(name: str, metric: str = "hit@1") -> Task:
    return Task(name, "MMEB-v2", "image", "I-CLS", "image_cls", "local", metric, SOURCE, ())


def found(queries: Mapping[str, Sequence[str]], relevant: str = "a") -> list[Ranking]:
    """Rankings by query id; one-letter names, each query answered by the same candidate."""
    return [
        Ranking(
            id, tuple(order), tuple(1.0 - place / 8 for place in range(len(order))), (relevant,)
        )
        for id, order in queries.items()
    ]


def run(
    path: Path,
    tasks: Mapping[str, list[Ranking]],
    settings: Mapping[str, Any] | None = None,
    metric: str = "hit@1",
) -> RunFolder:
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"model": "m", "settings": settings or {}}))
    folder = RunFolder(path)
    for name, rankings in tasks.items():
        folder.write(score_task(task(name, metric), rankings, 4), rankings)
    return folder


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "abcd", "2": "bacd", "3": "cabd", "4": "abcd"})})
    b = run(tmp_path / "b", {"t": found({"1": "abcd", "2": "abcd", "3": "acbd", "4": "dcba"})})
    comparison = compare(a, b)
    (t,) = comparison.tasks
    assert (t.task, t.group, t.modality, t.metric, t.queries) == ("t", "I-CLS", "image", "hit@1", 4)
    assert (t.score.a, t.score.b, t.score.delta) == (0.5, 0.75, 0.25)
    assert (t.better, t.worse) == (2, 1)
    assert t.score.interval.low <= 0.25 <= t.score.interval.high
    # three differences of size 1 sum up to 1 or more, or −1 or less, with any signs
    assert t.score.p_value == t.p_adjusted == 1.0
    assert t.ranks.top_1 == 1 / 4
    assert t.ranks.overlap_10 == 1.0
    # pairs in the other order: 0, 1, 1, 6 of 6
    assert t.ranks.kendall_tau == pytest.approx((1 + 4 / 6 + 4 / 6 - 1) / 4)
    assert t.query_cosine is None
    assert t.candidate_cosine is None
    assert comparison.overall == t.score
    assert (comparison.a, comparison.b) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_run_compared_with_itself_shows_nothing(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "abcd", "2": "bacd"})})
    comparison = compare(a, a)
    (t,) = comparison.tasks
    assert (t.score.delta, tuple(t.score.interval), t.score.p_value) == (0, (0, 0), 1)
    assert (t.ranks.top_1, t.ranks.overlap_10, t.ranks.kendall_tau) == (1, 1, 1)
    assert comparison.settings == []


def test_only_shared_queries_count_whatever_their_order(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "ab", "2": "ba", "3": "ab", "only a": "ab"})})
    b = run(tmp_path / "b", {"t": found({"3": "ab", "only b": "ba", "2": "ab", "1": "ba"})})
    (t,) = compare(a, b).tasks
    assert t.queries == 3
    assert (t.score.a, t.score.b) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (t.better, t.worse, t.ranks.top_1) == (1, 1, pytest.approx(1 / 3))


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    one = found({"1": "ab"})
    a = run(tmp_path / "a", {"left": one, "both": one, "others": one, "renamed": one})
    b = run(tmp_path / "b", {"both": one, "right": one, "others": found({"2": "ab"})})
    b.write(score_task(task("renamed", "recall@5"), one, 2), one)
    comparison = compare(a, b)
    assert [t.task for t in comparison.tasks] == ["both"]
    assert comparison.not_compared == [
        Missing("left", f"only {tmp_path / 'a'} has it"),
        Missing("others", "the runs have no query in common"),
        Missing("renamed", "scored by hit@1 in one run, recall@5 in the other"),
        Missing("right", f"only {tmp_path / 'b'} has it"),
    ]
    nothing = compare(run(tmp_path / "c", {}), run(tmp_path / "d", {}))
    assert (nothing.tasks, nothing.overall) == ([], None)


def test_scores_that_a_run_does_not_stand_by_are_not_compared(tmp_path: Path) -> None:
    one = found({"1": "ab"})
    a = run(tmp_path / "a", {"both": one, "stale": one, "old": one})
    b = run(tmp_path / "b", {"both": one, "stale": one})
    missing = [Missing("stale", "2 media files are missing"), Missing("old", "was not run")]
    (a.path / "summary.json").write_text(json.dumps({"missing": [vars(m) for m in missing]}))
    comparison = compare(a, b)
    assert [t.task for t in comparison.tasks] == ["both"]
    assert comparison.not_compared == [
        Missing("old", f"{tmp_path / 'a'} lists it as missing: was not run"),
        Missing("stale", f"{tmp_path / 'a'} lists it as missing: 2 media files are missing"),
    ]
    assert compare(b, a).not_compared == comparison.not_compared
    (b.path / "summary.json").write_text("[]")
    with pytest.raises(StoreError, match=r"b.summary\.json is damaged"):
        compare(a, b)


def test_listings_without_queries_are_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "ab"})})
    path = a.path / "tasks" / "t" / "items.json"
    for listing in (
        {"queries": [], "candidates": [["a", "k"]]},
        {"queries": ["k"], "candidates": []},
    ):
        path.write_text(json.dumps(listing))
        with pytest.raises(StoreError, match=r"items\.json lists no queries or no .*ume eval"):
            compare(a, a, task_embeddings)
    path.write_text("[" * 100_000)
    with pytest.raises(StoreError, match=r"items\.json .*ume eval"):
        compare(a, a, task_embeddings)
    path.write_text(json.dumps({"queries": ["k"], "candidates": [["a", "k"]]}))
    (t,) = compare(a, a, task_embeddings).tasks  # nothing embedded there
    assert t.query_cosine is None


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {}, {"dtype": "float32", "engine": "fast", "labels": "fixed"})
    b = run(tmp_path / "b", {}, {"dtype": "bfloat16", "engine": "fast", "context": 4096})
    assert compare(a, b).settings == [
        Setting("context", None, 4096),
        Setting("dtype", "float32", "bfloat16"),
        Setting("labels", "fixed", None),
    ]


@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [
        ({}, {"embedder": "plume", "profile": "before-profiles"}, False),
        ({}, {"embedder": "plume", "profile": "official"}, True),
        ({"profile": "official"}, {"profile": "plume-bundle"}, True),
        (
            {"profile": "official", "profile_fingerprint": "1"},
            {"profile": "official", "profile_fingerprint": "2"},
            True,
        ),
        ({"profile": "official"}, {"embedder": "gme", "profile": "vlm2vec"}, False),
        ({"profile": "official"}, {"source": "stored embeddings"}, False),
    ],
)
def test_two_profiles_of_a_family_are_not_compared(
    tmp_path: Path, one: dict[str, str], other: dict[str, str], refused: bool
) -> None:
    a, b = run(tmp_path / "a", {}, one), run(tmp_path / "b", {}, other)
    if not refused:
        compare(a, b)
        return
    with pytest.raises(StoreError) as caught:
        compare(a, b)
    for named in (str(a.path), str(b.path), "--profile", one.get("profile", "before-profiles")):
        assert named in str(caught.value)


def test_other_data_are_noticed(tmp_path: Path) -> None:
    rankings = found({"1": "ab"})
    a, b = run(tmp_path / "a", {}), run(tmp_path / "b", {})
    digests = {"same": ("d1", "d1"), "changed": ("d1", "d2"), "stored": ("d1", "")}
    for name, of_run in digests.items():
        for folder, made_from in zip((a, b), of_run, strict=True):
            folder.write(score_task(task(name), rankings, 4), rankings, made_from=made_from)
    for folder, relevant in ((a, "a"), (b, "b")):
        others = found({"1": "ab"}, relevant)
        folder.write(score_task(task("stored, relabelled"), others, 4), others)
    same_data = {one.task: one.same_data for one in compare(a, b).tasks}
    assert same_data == {
        "changed": False, "same": True, "stored": None, "stored, relabelled": False,
    }  # fmt: skip


def test_damage_is_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "ab"})})
    (a.path / "tasks" / "t" / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match=r"predictions\.jsonl is not what"):
        compare(a, a)


def test_embeddings_are_paired_by_query_and_by_name(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "ab", "2": "ba"}), "none": found({"1": "ab"})})
    b = run(tmp_path / "b", {"t": found({"2": "ab", "3": "ab"}), "none": found({"1": "ab"})})
    held = {
        "a": (torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 0], [1, 1]]), ["a", "b"]),
        "b": (torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]]), ["b", "x"]),
    }

    def embeddings(folder: Path, name: str) -> tuple[Any, Any, Sequence[str]] | None:
        return held[folder.name] if name == "t" else None

    without, with_them = compare(a, b, embeddings).tasks
    assert without.query_cosine is None
    assert with_them.query_cosine is not None
    assert with_them.candidate_cosine is not None
    # query "2" is row 1 of a and row 0 of b; candidate "b" is [1, 1] there and [1, 0] here
    assert (with_them.query_cosine.items, with_them.query_cosine.mean) == (1, 1.0)
    assert with_them.candidate_cosine.minimum == pytest.approx(math.sqrt(0.5))
    held["a"] = (torch.eye(3), held["a"][1], ["a", "b"])
    with pytest.raises(StoreError, match="t has 3 embeddings for 2 queries"):
        compare(a, b, embeddings)


def test_cosines_by_hand() -> None:
    angles = np.radians(np.arange(101.0))  # cosines of 0, 1, …, 100 degrees
    one = np.tile(np.array([[3.0, 0.0]], dtype=np.float32), (101, 1))
    other = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    everything = range(101)
    result = paired_cosines(one, other, list(everything), list(everything))
    assert result is not None
    assert result.items == 101
    assert result.minimum == pytest.approx(math.cos(math.radians(100)))
    assert result.p1 == pytest.approx(math.cos(math.radians(99)))
    assert result.median == pytest.approx(math.cos(math.radians(50)))
    assert result.mean == pytest.approx(float(np.cos(angles).mean()))
    assert paired_cosines(one, other[:, :1], [0], [0]) is None
    assert paired_cosines(one, other, [], []) is None
    zero = paired_cosines(np.zeros((1, 2)), other, [0], [0])
    assert zero is not None and zero.mean == 0


def test_cosines_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 10, 3))
    rows = [list(range(10)), list(range(9, -1, -1))]
    whole = paired_cosines(a, b, *rows)
    monkeypatch.setattr("ume_models.mmeb.agreement._ROWS", 3)
    assert paired_cosines(a, b, *rows) == whole


@given(order=st.permutations("abcdefgh"), cut=st.integers(2, 8))
def test_kendalls_tau_is_scipys(order: list[str], cut: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy's Kendall tau is not here")
    kept = [name for name in order[:cut] if name in "abcdef"]
    expected = (
        stats.kendalltau(range(len(kept)), ["abcdef".index(name) for name in kept]).statistic
        if len(kept) > 1
        else None
    )
    tau = kendall_tau("abcdef", order[:cut])
    assert tau == (None if expected is None else pytest.approx(expected))


def test_agreement_of_short_long_and_empty_rankings() -> None:
    long = "abcdefghijkl"
    agreement = rank_agreement([long, "ab", "a", ""], [long[::-1], "ba", "x", ""])
    assert agreement.top_1 == 1 / 4  # two empty rankings agree
    # the first ten of twelve and of the reversed twelve share ten minus two, of ten
    assert agreement.overlap_10 == pytest.approx((8 / 10 + 1 + 0 + 1) / 4)
    assert agreement.kendall_tau == -1
    assert rank_agreement(["a"], ["a"]).kendall_tau is None
    with pytest.raises(ValueError, match="no queries"):
        rank_agreement([], [])


@given(better=st.integers(0, 30), worse=st.integers(0, 30), same=st.integers(1, 50))
def test_hits_are_tested_as_mcnemar_does(better: int, worse: int, same: int) -> None:
    """For differences of ±1 the sign-flip test is the exact binomial test of the signs."""
    stats = pytest.importorskip("scipy.stats", reason="SciPy's binomial test is not here")
    differences = np.repeat([1.0, -1.0, 0.0], [better, worse, same])
    p = two_sided_p(float(differences.mean()), sign_flip_means(differences, "task"))
    exact = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    # of 10,000 draws: five standard errors, and the observed one among them
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 10_000) + 2e-4)


def test_graded_differences_are_tested_as_scipy_does() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy's permutation test is not here")
    differences = np.random.default_rng(4).normal(0.3, 1.0, size=14)
    exact = stats.permutation_test(
        (differences, np.zeros(14)),
        lambda a, b: float(np.mean(a - b)),
        permutation_type="samples",
        n_resamples=np.inf,  # all signs
    ).pvalue
    p = two_sided_p(float(differences.mean()), sign_flip_means(differences, "task"))
    assert 0.02 < exact < 0.98
    assert p == pytest.approx(exact, abs=0.02)


def test_sure_differences_stay_significant_among_many_tasks(tmp_path: Path) -> None:
    queries = [str(number) for number in range(60)]
    right, wrong = found(dict.fromkeys(queries, "ab")), found(dict.fromkeys(queries, "ba"))
    mixed = found({id: "ab" if int(id) % 2 else "ba" for id in queries})
    names = [f"same {number}" for number in range(20)]
    a = run(tmp_path / "a", {"won": wrong, **dict.fromkeys(names, mixed)})
    b = run(tmp_path / "b", {"won": right, **dict.fromkeys(names, mixed)})
    comparison = compare(a, b)
    tasks = {t.task: t for t in comparison.tasks}
    assert tasks["won"].score.p_value == pytest.approx(1 / 10_001)
    assert tasks["won"].p_adjusted == pytest.approx(21 / 10_001)
    assert tasks["same 3"].p_adjusted == 1
    assert comparison.overall is not None
    assert comparison.overall.delta == pytest.approx(1 / 21)
    assert comparison.overall.p_value < 0.001
    # on this task every query differs alike, on the others none does
    assert tuple(comparison.overall.interval) == pytest.approx((1 / 21, 1 / 21))


def test_holms_correction_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04: × 4, 3, 2, 1 and never below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_is_json(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"t": found({"1": "abcd", "2": "bacd"})}, {"dtype": "float32"})
    b = run(tmp_path / "b", {"t": found({"1": "bacd", "2": "bacd"})})
    comparison = compare(a, b)
    assert isinstance(comparison, Comparison)
    value = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert value["tasks"][0]["score"]["delta"] == -0.5
    assert value["settings"] == [{"name": "dtype", "a": "float32", "b": None}]
    assert value["overall"]["interval"] == list(comparison.overall.interval)
