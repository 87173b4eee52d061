"""Exact and faiss indexes: rankings, files, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from ume_models.errors import StoreError, UmeError
from ume_models.retrieval import ExactIndex, FaissIndex, Index, local_search


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
        ("index.json", lambda data: b'{"a":' * 10**5),
        ("index.safetensors", lambda data: save({"other": torch.ones(9, 16)})),
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
    with pytest.raises(FileNotFoundError, match=r"has no index\.json"):
        ExactIndex.load(tmp_path / "nothing")


def test_arrays_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"embeddings must be a tensor, got ndarray: torch"):
        ExactIndex(vectors(9).numpy(), names(9))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries must be a tensor, got ndarray"):
        ExactIndex(vectors(9), names(9)).search(vectors(2).numpy(), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_only_what_is_allowed_is_found(kind: Any, share: float) -> None:
    index, queries = kind(vectors(60), names(60)), vectors(3, seed=4)
    scores = queries.numpy() @ vectors(60).numpy().T
    generator = torch.Generator().manual_seed(5)
    for shape in ((60,), (3, 60)):
        allowed = torch.rand(shape, generator=generator) < share
        result = index.search(queries, 30, allowed=allowed)
        for i in range(3):
            mask = allowed.expand(3, -1)[i].numpy()
            order = [row for row in np.argsort(-scores[i], kind="stable") if mask[row]][:30]
            assert result.rows[i].tolist() == [*order, *[-1] * (30 - len(order))]
            assert result.ids[i] == [f"item {row}" for row in order]
            assert bool((result.scores[i, len(order) :] == float("-inf")).all())


def test_each_query_ranks_its_own_candidates(kind: Any) -> None:
    index, queries = kind(vectors(60), names(60)), vectors(3, seed=4)
    lists = [[], ["item 7"], ["item 9", "item 3", "item 9", "item 50"]]
    scores = queries.numpy() @ vectors(60).numpy().T
    expected = [
        sorted(set(ids), key=lambda n: -scores[i, int(n[5:])]) for i, ids in enumerate(lists)
    ]
    result = index.search(queries, 2, candidates=lists)
    assert result.ids == [ids[:2] for ids in expected]
    assert result.rows[0].tolist() == [-1, -1]
    assert local_search(index, queries, lists, len(index)).ids == expected
    assert local_search(index, queries, [[], [], []], len(index)).ids == [[], [], []]
    mask = torch.ones(60, dtype=torch.bool)
    mask[3] = False
    found = index.search(queries, 4, candidates=lists, allowed=mask).ids[2]
    assert found == [name for name in expected[2] if name != "item 3"]


class Labelled:
    """A sequence that is looked up by label, as a pandas Series is."""

    def __init__(self, values: list[str]) -> None:
        self.by_label = dict(zip(reversed(range(len(values))), values, strict=True))

    def __len__(self) -> int:
        return len(self.by_label)

    def __iter__(self) -> Any:
        return iter(self.by_label.values())

    def __getitem__(self, label: int) -> str:
        return self.by_label[label]

    def __contains__(self, label: object) -> bool:
        return label in self.by_label


def test_ids_of_any_sequence_are_read_by_position_and_kept(kind: Any, tmp_path: Path) -> None:
    texts = ["seven", "circle", "sales"]
    mutable = list(texts)
    for ids in (
        Labelled(texts),
        np.array(texts),
        tuple(texts),
        (name for name in texts),
        dict.fromkeys(texts).keys(),
        mutable,
    ):
        index = kind(torch.eye(3), ids)
        mutable.reverse()
        assert index.search(torch.eye(3), 1).ids == [[name] for name in texts]
        index.save(tmp_path)
        assert kind.load(tmp_path).ids == texts
        mutable.reverse()
    for numbers in (np.arange(3) + 5, torch.arange(3) + 5, list(np.arange(3, dtype=np.int32) + 5)):
        index = kind(torch.eye(3), numbers)
        candidates = (np.array([7, 5]) for _ in range(1))
        assert index.search(torch.eye(3)[:1], 2, candidates=list(candidates)).ids == [[5, 7]]
        index.save(tmp_path)
    for wrong in (["a", None, "c"], "abc", np.eye(3), ["a", float("nan"), "b"]):
        with pytest.raises(ValueError, match="id"):
            kind(torch.eye(3), wrong)
    lists = [Labelled(["seven", "sales"])]
    found = local_search(kind(torch.eye(3), texts), torch.eye(3)[:1], lists, 2)
    assert found.ids == [["seven", "sales"]]


def test_numbers_of_numpy_and_queries_of_double_precision(kind: Any) -> None:
    index, queries = kind(vectors(9), names(9)), vectors(2, seed=3)
    expected = index.search(queries, 2)
    found = index.search(queries.double(), np.int64(2))
    assert torch.equal(found.scores, expected.scores)
    assert found.ids == expected.ids
    with pytest.raises(ValueError, match="NaN or infinity"):
        index.search(queries.double() * 1e300, 1)


def test_an_id_stands_twice_only_if_asked_for(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' stands for several rows"):
        kind(vectors(4), ["a", "b", "a", "c"])
    with pytest.raises(ValueError, match="duplicates"):
        kind(vectors(2), ["a", "b"], duplicates="drop")
    kind(vectors(4), ["a", "b", "a", "c"], duplicates="keep").save(tmp_path)
    assert kind.load(tmp_path).ids == ["a", "b", "a", "c"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_loading_takes_the_memory_of_the_embeddings_once(tmp_path: Path) -> None:
    embeddings = vectors(100_000, dim=256)  # 102 MB
    ExactIndex(embeddings, names(100_000)).save(tmp_path)
    program = (
        "import re, sys; from ume_models.retrieval import ExactIndex\n"
        "peak = lambda: int(re.search('VmHWM:.*?([0-9]+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); index = ExactIndex.load(sys.argv[1]); print(peak() - before)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(shown.stdout) * 1024 < 1.6 * embeddings.nbytes


def test_candidates_must_name_one_row(kind: Any) -> None:
    index = kind(vectors(4), ["a", "b", "a", "c"], duplicates="keep")
    assert len(index.search(vectors(1), 4).ids[0]) == 4  # both rows of "a" are found
    with pytest.raises(ValueError, match="'a' stands for several rows"):
        index.search(vectors(1), 1, candidates=[["b", "a"]])
    with pytest.raises(ValueError, match="'x' is not in the index"):
        index.search(vectors(1), 1, candidates=[["x"]])
    with pytest.raises(ValueError, match="1 lists of candidates for 2 queries"):
        index.search(vectors(2), 1, candidates=[["b"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mapped_index_stays_in_its_file(dtype: torch.dtype, tmp_path: Path) -> None:
    index = ExactIndex(vectors(500).to(dtype), names(500))
    index.save(tmp_path)
    mapped = ExactIndex.load(tmp_path, mapped=True)
    assert mapped.device.type == "cpu"
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "index.safetensors") in maps.read_text()
    lists = [["item 3", "item 400"], ["item 1"]]
    for options in ({}, {"candidates": lists}, {"allowed": torch.arange(500) % 2 == 0}):
        got = mapped.search(vectors(2, seed=6), 5, **options)
        expected = index.search(vectors(2, seed=6), 5, **options)
        assert torch.equal(got.scores, expected.scores)
        assert got.ids == expected.ids
    mapped.save(tmp_path)  # over the file it is read from
    assert ExactIndex.load(tmp_path).search(vectors(1), 3).ids == index.search(vectors(1), 3).ids
    held = mapped.to("cpu")
    assert held.search(vectors(1), 3).ids == index.search(vectors(1), 3).ids


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    ExactIndex(vectors(8).bfloat16(), names(8)).save(tmp_path)
    half = (tmp_path / "index.safetensors").stat().st_size
    ExactIndex(vectors(8), names(8), device="cpu").save(tmp_path)
    assert (tmp_path / "index.safetensors").stat().st_size - half == 8 * 16 * 2


def test_a_mapped_index_does_not_move_while_it_loads(tmp_path: Path) -> None:
    ExactIndex(vectors(8), names(8)).save(tmp_path)
    with pytest.raises(ValueError, match="stays in its file or goes to a device"):
        ExactIndex.load(tmp_path, mapped=True, device="cuda")


def test_a_gpu_index_needs_a_faiss_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(UmeError, match="pip install faiss-gpu-cu12"):
        FaissIndex(vectors(8), names(8), gpu=True)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(UmeError, match="finds no GPU"):
        FaissIndex(vectors(8), names(8), gpu=True)
    copied = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: copied.append(index) or index)
    index = FaissIndex(vectors(8), names(8), gpu=True)
    assert len(copied) == 1
    assert index.description == "faiss Flat on the GPUs"
    assert index.search(vectors(8), 1).rows.flatten().tolist() == list(range(8))


def test_descriptions_name_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    index = ExactIndex(vectors(8), names(8))
    monkeypatch.setenv("UME_BACKEND", "similarity_topk:torch")
    assert index.description == "exact, torch backend"
