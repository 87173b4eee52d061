"""Ranking behind the scripts' own ``np``: the same order, none of the matrix."""

from __future__ import annotations

import copy
import json
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ume_models.errors import PatchError
from ume_models.patching import ranked, ranking
from ume_models.patching.changes import commit, undo
from ume_models.patching.ranking import NumpyWithRanking, Product, Ranking
from ume_models.patching.recipes import plan

proxy: Any = NumpyWithRanking(np)


def embeddings(rows: int, width: int = 16, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def rank(numpy: Any, queries: np.ndarray, candidates: np.ndarray) -> Any:
    """The scripts' two lines."""
    cosine_scores = numpy.dot(queries, candidates.T)
    return numpy.argsort(-cosine_scores, axis=1)


def assert_same_order(found: Any, scores: np.ndarray) -> None:
    """Equal to a stable sort wherever scores differ by more than a product's rounding."""
    expected = np.argsort(-scores, axis=1, kind="stable")
    assert found.shape == expected.shape
    for row, wanted, values in zip(found, expected, scores, strict=True):
        row = np.asarray(row)
        assert sorted(row.tolist()) == list(range(len(values)))
        differ = row != wanted
        assert np.all(np.abs(values[row[differ]] - values[wanted[differ]]) <= 1e-6)


@pytest.mark.parametrize(("queries", "candidates"), [(1, 1), (5, 7), (9, 2047), (6, 5000)])
@pytest.mark.parametrize("block_rows", [1, 4, 100])
def test_order(
    queries: int, candidates: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranked, "BLOCK_BYTES", 12 * candidates * block_rows)
    q, c = embeddings(queries), embeddings(candidates, seed=1)
    found = rank(proxy, q, c)
    assert type(found) is Ranking
    assert_same_order(found, q @ c.T)
    assert [row.tolist() for row in found] == found.tolist() == np.asarray(found).tolist()


@pytest.mark.parametrize("candidates", [50, 6000])
def test_ties_go_to_the_lowest_index_and_zeros_have_no_sign(candidates: int) -> None:
    generator = np.random.default_rng(3)
    values = np.array([-2.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, np.inf, -np.inf], dtype=np.float32)
    column = generator.choice(values, (candidates, 1))
    found = rank(proxy, np.ones((2, 1), dtype=np.float32), column)
    scores = np.repeat(column.T, 2, axis=0)
    assert np.array_equal(np.asarray(found), np.argsort(-scores, axis=1, kind="stable"))


@pytest.mark.parametrize("candidates", [50, 6000])
def test_nan_comes_last_as_in_numpy(candidates: int) -> None:
    q, c = embeddings(3), embeddings(candidates, seed=1)
    c[::7] = np.nan
    c[::14] *= -1
    found = np.asarray(rank(proxy, q, c))
    assert np.array_equal(found, np.argsort(-(q @ c.T), axis=1, kind="stable"))


def test_rows_are_arrays_that_yield_python_integers() -> None:
    rows = rank(proxy, embeddings(3), embeddings(40, seed=1))
    row = next(iter(rows))
    assert isinstance(row, np.ndarray) and row.dtype == np.int64 and row.shape == (40,)
    assert {type(index) for index in row} == {int}
    assert json.loads(json.dumps(list(row))) == row.tolist()
    assert isinstance(row[0], np.int64)
    names = [f"c{i}" for i in range(40)]
    assert [names[i] for i in row] == [names[i] for i in np.asarray(row)]


def test_the_matrix_of_scores_is_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = embeddings(64), embeddings(3000, seed=1)
    monkeypatch.setattr(ranked, "BLOCK_BYTES", 12 * 3000 * 8)
    largest = 0

    class Watched(ranked._OnCpu):
        def order(self, queries: np.ndarray) -> np.ndarray:
            nonlocal largest
            largest = max(largest, len(queries))
            return super().order(queries)

    monkeypatch.setattr(ranked, "_OnCpu", Watched)
    rows = rank(proxy, queries, candidates)
    assert sum(1 for _ in zip(rows, range(64), strict=True)) == 64
    assert largest == 8
    assert rows.array is None


def test_rows_by_index_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "BLOCK_BYTES", 12 * 30 * 4)
    rows = rank(proxy, embeddings(10), embeddings(30, seed=1))
    expected = np.stack(list(rows))
    for index in (9, 0, -1, 3, np.int64(4)):
        assert np.array_equal(rows[index], expected[index])
    assert rows.array is None
    assert np.array_equal(rows[2:5, :3], expected[2:5, :3])
    with pytest.raises(IndexError):
        rows[10]
    assert len(rows) == 10 and rows.ndim == 2 and rows.size == 300


def test_leaving_early_ends_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(ranked, "BLOCK_BYTES", 12 * 30)
    before = threading.active_count()
    rows = iter(rank(proxy, embeddings(10), embeddings(30, seed=1)))
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_background_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scores: np.ndarray, out: np.ndarray) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(ranked, "_order_row", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(rank(proxy, embeddings(3), embeddings(30, seed=1)))


def test_a_waiting_product_is_an_array_for_everything_else() -> None:
    q, c = embeddings(4), embeddings(6, seed=1)
    expected = np.dot(q, c.T)
    uses = [
        lambda s: s[1:, ::2],
        lambda s: s.max(axis=1),
        lambda s: s.T,
        lambda s: s + 1,
        lambda s: 2 - s,
        lambda s: s > 0,
        lambda s: s @ s.T,
        lambda s: np.exp(s),
        lambda s: np.argsort(s, axis=1),
        lambda s: proxy.argsort(s, axis=1),
        lambda s: proxy.argsort(-s, axis=0),
        lambda s: proxy.argsort(-s, axis=None, kind="stable"),
        lambda s: np.concatenate([s, s]),
        lambda s: np.asarray(s, dtype=np.float64),
        lambda s: np.stack(list(s)),
        lambda s: s.tolist(),
        lambda s: copy.deepcopy(s),
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: -s,
        lambda s: [len(s), s.shape, s.dtype.name, s.ndim, s.size, s.nbytes],
        lambda s: np.float32(0.1) in s,
        lambda s: isinstance(s, np.ndarray),
        lambda s: repr(s),
    ]
    for use in uses:
        waiting = proxy.dot(q, c.T)
        assert type(waiting) is Product
        found, wanted = use(waiting), use(expected)
        assert type(found) is type(wanted) or type(found) is Product
        assert repr(found) == repr(wanted)


def test_what_is_written_into_a_product_counts() -> None:
    q, c = embeddings(4), embeddings(6, seed=1)
    expected, waiting = np.dot(q, c.T), proxy.dot(q, c.T)
    for scores in (expected, waiting):
        scores[:, 2] = 5
        scores *= 2
    best = proxy.argsort(-waiting, axis=1)
    assert np.array_equal(best, np.argsort(-expected, axis=1))
    assert np.all(best[:, 0] == 2)


def test_everything_else_is_numpy() -> None:
    assert proxy.ndarray is np.ndarray and proxy.linalg is np.linalg
    assert proxy.__version__ == np.__version__ and dir(proxy) == dir(np)
    assert pickle.loads(pickle.dumps(proxy)) is np
    vector, matrix = embeddings(1)[0], embeddings(6, seed=1)
    for a, b in [
        (vector, matrix.T),
        (matrix.astype(np.float64), matrix.T),
        (np.zeros((0, 16), np.float32), matrix.T),
        (2.0, matrix),
    ]:
        found = proxy.dot(a, b)
        assert type(found) is np.ndarray
        assert np.array_equal(found, np.dot(a, b))
    out = np.empty((6, 6), np.float32)
    assert proxy.dot(matrix, matrix.T, out=out) is out
    scores = vector @ matrix.T
    assert np.array_equal(proxy.argsort(-scores), np.argsort(-scores))
    with pytest.raises(ValueError, match="aligned"):
        proxy.dot(matrix, matrix)


SCRIPT = """
import numpy as np
class RankingMetrics: pass
def encode_embeddings(): pass
def rank(q, c):
    return np.argsort(-np.dot(q, c.T), axis=1)
"""
KINDS = {
    "plume-eval": "def _latent_reasoning_generate_rep(): pass",
    "ume-r1": "def get_gen_embedding_idx(): pass\ndef get_disc_embedding_idx(): pass",
    "vlm2vec": "",
}


def script(kind: str, source: str = SCRIPT) -> ModuleType:
    module = ModuleType("__main__")
    exec(compile(source + KINDS[kind], kind, "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_each_script_has_one_recipe(kind: str) -> None:
    module = script(kind)
    fitting = [recipe for recipe in ranking.RECIPES if recipe.recognises(module)]
    assert [recipe.name for recipe in fitting] == [kind]
    changes, entries = plan(fitting[0], module)
    assert "np" in vars(module) and vars(module)["np"] is np
    commit(changes)
    q, c = embeddings(3), embeddings(9, seed=1)
    assert type(module.rank(q, c)) is Ranking
    assert type(np.dot(q, c.T)) is np.ndarray
    assert entries[0].target == "__main__.np"
    again, told = plan(fitting[0], module)
    assert not again and told[0].action == "left alone"
    undo(changes)
    assert vars(module)["np"] is np


def test_other_modules_keep_their_numpy() -> None:
    module, helper = script("ume-r1"), ModuleType("src.utils")
    helper.np = np  # type: ignore[attr-defined]
    recipe = next(recipe for recipe in ranking.RECIPES if recipe.recognises(module))
    changes, _ = plan(recipe, module, importers=[helper])
    commit(changes)
    assert vars(helper)["np"] is np
    undo(changes)


def test_a_script_without_np_or_with_another_one() -> None:
    recipe = ranking.RECIPES[0]
    with pytest.raises(PatchError, match=r"np: it does not exist"):
        plan(recipe, script("plume-eval", "from numpy import dot\n"))
    with pytest.raises(PatchError, match="somebody else replaced it"):
        plan(recipe, script("plume-eval", "import math as np\n"))


def test_a_gpu_is_used_only_where_it_multiplies_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rows = ranked.RankedRows(embeddings(2), embeddings(4, seed=1).T)
    assert not ranked._gpu_has_room(rows) or torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    assert ranked._gpu_has_room(rows)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not ranked._gpu_has_room(rows)
