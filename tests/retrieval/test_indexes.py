"""Exact and faiss indexes: rankings, files, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_models.errors import StoreError, UmeError
from ume_models.retrieval import ExactIndex, FaissIndex, Index


def vectors(rows: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def names(rows: int) -> list[str]:
    return [f"item {row}" for row in range(rows)]


@pytest.fixture(params=[ExactIndex, FaissIndex])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param is FaissIndex:
        pytest.importorskip("faiss")
    return request.param


def test_the_ranking_is_numpys(kind: Any) -> None:
    candidates, queries = vectors(200), vectors(7, seed=1)
    index: Index = kind(candidates, names(200))
    assert isinstance(index, Index)
    assert (len(index), index.dim, index.ids[3]) == (200, 16, "item 3")
    result = index.search(queries, 5)
    scores = queries.numpy() @ candidates.numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(result.rows.numpy(), order)
    np.testing.assert_allclose(
        result.scores.numpy(), np.take_along_axis(scores, order, axis=1), atol=1e-6
    )
    assert result.ids == [[f"item {row}" for row in line] for line in order.tolist()]


def test_saved_and_loaded_it_answers_the_same_without_pickle(kind: Any, tmp_path: Path) -> None:
    index = kind(vectors(50), names(50))
    index.save(tmp_path / "new" / "index")
    assert sorted(path.name for path in (tmp_path / "new" / "index").iterdir()) == [
        "index.json",
        "index.safetensors",
    ]
    loaded = kind.load(tmp_path / "new" / "index")
    expected, found = index.search(vectors(4, seed=2), 9), loaded.search(vectors(4, seed=2), 9)
    assert torch.equal(found.scores, expected.scores)
    assert found.ids == expected.ids


def test_an_approximate_index_survives_saving(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = FaissIndex(vectors(300), names(300), "HNSW16")
    index.save(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["settings"] == {"factory": "HNSW16"}
    best = FaissIndex.load(tmp_path).search(vectors(300), 1)
    assert sum(row == found[0] for row, found in enumerate(best.rows.tolist())) > 270


def test_exact_search_of_half_precision_keeps_ties_in_order() -> None:
    candidates = vectors(5).bfloat16().repeat(3, 1)
    result = ExactIndex(candidates, names(15)).search(candidates[1:2], 3)
    assert result.ids == [["item 1", "item 6", "item 11"]]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), dim=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_results_are_sorted_distinct_and_consistent(
    rows: int, dim: int, seed: int, data: st.DataObject
) -> None:
    candidates = vectors(rows, dim, seed)
    k = data.draw(st.integers(1, rows))
    result = ExactIndex(candidates, names(rows)).search(vectors(3, dim, seed + 1), k)
    assert result.scores.shape == (3, k)
    assert bool((result.scores[:, :-1] >= result.scores[:, 1:]).all())
    assert all(len(set(line)) == k for line in result.ids)
    full = ExactIndex(candidates, names(rows)).search(vectors(3, dim, seed + 1), rows)
    assert [line[:k] for line in full.ids] == result.ids


def test_wrong_arguments_are_named(kind: Any) -> None:
    index = kind(vectors(4), names(4))
    with pytest.raises(ValueError, match="k is 5"):
        index.search(vectors(1), 5)
    with pytest.raises(ValueError, match="k is 0"):
        index.search(vectors(1), 0)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 16\]"):
        index.search(vectors(1, dim=3), 1)
    with pytest.raises(ValueError, match="queries hold NaN"):
        index.search(torch.full((1, 16), float("nan")), 1)
    with pytest.raises(ValueError, match="3 ids for 4"):
        kind(vectors(4), names(3))
    with pytest.raises(ValueError, match=r"'item 2' .* is not finite"):
        kind(vectors(4).index_fill(0, torch.tensor([2]), float("inf")), names(4))
    with pytest.raises(ValueError, match="non-empty"):
        kind(torch.empty(0, 16), [])


def test_a_factory_faiss_does_not_know_is_named() -> None:
    pytest.importorskip("faiss")
    with pytest.raises(UmeError, match="'Nonsense'"):
        FaissIndex(vectors(4), names(4), "Nonsense")


def test_an_index_that_finds_too_few_says_so() -> None:
    pytest.importorskip("faiss")
    # One of ten cells is searched, which cannot hold all 400.
    index = FaissIndex(vectors(400), names(400), "IVF10,Flat")
    with pytest.raises(UmeError, match="fewer than 400"):
        index.search(vectors(1), 400)


def test_missing_faiss_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UmeError, match="pip install faiss-cpu"):
        FaissIndex(vectors(4), names(4))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index.json", lambda data: data[:-5]),
        ("index.json", lambda data: b"[]"),
        ("index.json", lambda data: data.replace(b"ume-index", b"other")),
        ("index.json", lambda data: data.replace(b'"item 3", ', b"")),
        ("index.safetensors", lambda data: data[:-5]),
        ("index.safetensors", lambda data: b""),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    ExactIndex(vectors(9), names(9)).save(tmp_path)
    data = (tmp_path / name).read_bytes()
    assert change(data) != data
    (tmp_path / name).write_bytes(change(data))
    with pytest.raises(StoreError, match="not a readable index"):
        ExactIndex.load(tmp_path)


def test_another_kind_of_index_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    ExactIndex(vectors(9), names(9)).save(tmp_path)
    with pytest.raises(StoreError, match="type 'exact', not 'faiss'"):
        FaissIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        ExactIndex.load(tmp_path / "nothing")
