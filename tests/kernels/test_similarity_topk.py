"""similarity_topk against NumPy's stable argsort, and its promises about ties and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ume_kernels import dispatch, native
from ume_kernels.dispatch import Backend, BackendError
from ume_kernels.similarity_topk import similarity_topk, similarity_topk_reference

BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(native.module is None, reason=str(native.missing))
    ),
    "torch",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def numpy_topk(q: torch.Tensor, c: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = q.double().numpy() @ c.double().numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def integers(rows: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Products of these are exact in every dtype, so that rankings must be identical."""
    return torch.randint(-2, 3, (rows, dim), generator=generator).to(dtype)


def loop(
    q: torch.Tensor,
    c: torch.Tensor,
    k: int,
    *,
    lists: list[list[int]] | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition for exact inputs, one pair at a time."""
    scores = torch.full((q.shape[0], k), float("-inf"))
    indices = torch.full((q.shape[0], k), -1)
    for i in range(q.shape[0]):
        found = []
        for j in range(c.shape[0]) if lists is None else lists[i]:
            if allowed is None or bool((allowed[i] if allowed.ndim == 2 else allowed)[j]):
                found.append((-float(q[i].double() @ c[j].double()), j))
        for place, (score, j) in enumerate(sorted(found)[:k]):
            scores[i, place], indices[i, place] = -score, j
    return scores, indices


# Drawing waits where other tests have the cores.
unhurried = settings(suppress_health_check=[HealthCheck.too_slow])


def same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[Any, Any]) -> None:
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int64
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@unhurried
@given(
    rows=st.integers(0, 9),
    candidates=st.integers(1, 700),
    dim=st.integers(1, 20),
    k=st.integers(1, 700),
    block=st.none() | st.integers(1, 600),
    seed=st.integers(0, 2**16),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_small_integers_rank_exactly_as_numpy_with_many_ties(
    backend: str,
    rows: int,
    candidates: int,
    dim: int,
    k: int,
    block: int | None,
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = integers(rows, dim, dtypes[0], generator)
    c = integers(candidates, dim, dtypes[1], generator)
    k = min(k, candidates)
    scores, indices = similarity_topk(q, c, k, block=block, backend=backend)
    expected_scores, expected = numpy_topk(q, c, k)
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


@pytest.mark.parametrize("backend", BACKENDS)
@unhurried
@given(
    rows=st.integers(1, 7),
    candidates=st.integers(1, 300),
    dim=st.integers(1, 9),
    k=st.integers(1, 40),
    block=st.none() | st.integers(1, 300),
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([None, "candidates", "pairs"]),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    ragged=st.sampled_from([None, "lists", "offsets"]),
)
def test_masks_and_segments_match_a_plain_loop(
    backend: str,
    rows: int,
    candidates: int,
    dim: int,
    k: int,
    block: int | None,
    seed: int,
    shape: str | None,
    share: float,
    ragged: str | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = integers(rows, dim, torch.float32, generator)
    c = integers(candidates, dim, torch.bfloat16, generator)
    k = min(k, candidates)
    allowed = None
    if shape is not None:
        size = (candidates,) if shape == "candidates" else (rows, candidates)
        allowed = torch.rand(size, generator=generator) < share
    lists = segments = None
    if ragged is not None:
        sizes = torch.randint(0, candidates + 1, (rows,), generator=generator).tolist()
        lists = [torch.randperm(candidates, generator=generator)[:size].tolist() for size in sizes]
        segments = lists
        if ragged == "offsets":
            flat = torch.tensor([j for part in lists for j in part], dtype=torch.int64)
            segments = (flat, torch.tensor([0, *sizes]).cumsum(0))
    got = similarity_topk(q, c, k, segments=segments, allowed=allowed, block=block, backend=backend)
    same(got, loop(q, c, k, lists=lists, allowed=allowed))
    reference = similarity_topk_reference(
        q, c, k, allowed=allowed,
        segments=None if lists is None else [torch.tensor(part).long() for part in lists],
    )  # fmt: skip
    same(got, reference)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_random_vectors_match_numpy_in_double(
    dtype: torch.dtype, normalize: bool, backend: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(300, 40, generator=generator).to(dtype)
    c = torch.randn(2000, 40, generator=generator).to(dtype)
    scores, indices = similarity_topk(q, c, 10, normalize=normalize, block=300, backend=backend)
    wide_q, wide_c = q.double(), c.double()
    if normalize:
        wide_q = torch.nn.functional.normalize(wide_q, dim=1)
        wide_c = torch.nn.functional.normalize(wide_c, dim=1)
    expected_scores, _ = numpy_topk(wide_q, wide_c, 10)
    np.testing.assert_allclose(scores.numpy(), expected_scores, atol=2e-5)
    named = np.take_along_axis(wide_q.numpy() @ wide_c.numpy().T, indices.numpy(), axis=1)
    np.testing.assert_allclose(scores.numpy(), named, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 2, 7, 257, 300])
@pytest.mark.parametrize("candidates", [3, 255, 700, 1025])
@pytest.mark.parametrize("block", [1, 256, 1000, 16384])
def test_any_block_gives_the_bits_of_the_reference(
    queries: int, candidates: int, block: int
) -> None:
    generator = torch.Generator().manual_seed(queries * candidates)
    q = torch.randn(queries, 33, generator=generator)
    c = torch.randn(candidates, 33, generator=generator)
    k = min(50, candidates)
    same(similarity_topk(q, c, k, block=block, backend="torch"), similarity_topk_reference(q, c, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5, 260])
def test_neither_blocks_nor_other_queries_nor_the_way_of_asking_change_a_bit(
    queries: int, dtype: torch.dtype, backend: str
) -> None:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, 72, generator=generator).to(dtype)
    c = torch.randn(1500, 72, generator=generator).to(dtype)
    for normalize in (False, True):
        whole = similarity_topk(q, c, 90, normalize=normalize, backend=backend)
        for block in (1, 300, 512):
            same(
                similarity_topk(q, c, 90, normalize=normalize, block=block, backend=backend), whole
            )
        lists = [list(range(1500)) for _ in range(queries)]
        listed = similarity_topk(
            q, c, 90, normalize=normalize, segments=lists, backend=backend, block=300
        )
        same(
            similarity_topk(q, c, 90, normalize=normalize, segments=lists, backend=backend), listed
        )
        torch.testing.assert_close(listed[0], whole[0], atol=2e-5, rtol=1e-5)
        if backend == "native":
            same(listed, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("queries", [1, 5, 260])
@pytest.mark.parametrize("copies", [2, 255, 263, 777])
def test_copies_of_one_vector_keep_their_order(
    queries: int, copies: int, normalize: bool, backend: str
) -> None:
    # A plain matmul fails this: the last columns are summed in another order.
    generator = torch.Generator().manual_seed(copies)
    q = torch.nn.functional.normalize(torch.randn(queries, 384, generator=generator), dim=1)
    vector = torch.nn.functional.normalize(torch.randn(1, 384, generator=generator), dim=1)
    c, expected = vector.expand(copies, -1), torch.arange(copies).expand(queries, -1)
    shuffled = torch.randperm(copies, generator=generator)
    for segments in (None, [shuffled] * queries):
        scores, indices = similarity_topk(
            q, c, copies, normalize=normalize, segments=segments, block=256, backend=backend
        )
        assert torch.equal(indices, expected)
        assert torch.equal(scores, scores[:, :1].expand(-1, copies))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_alignment_of_the_inputs_do_not_matter(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(6, 31, generator=generator)
    c = torch.randn(900, 31, generator=generator)
    expected = similarity_topk(q, c, 20, normalize=True, backend=backend)
    wide = torch.zeros(900, 33)
    wide[:, 1:32] = c
    columns = torch.zeros(31, 900).copy_(c.T).T
    for other in (wide[:, 1:32], columns, columns.numpy(), c.flip(0).numpy()[::-1]):
        same(similarity_topk(q, other, 20, normalize=True, block=256, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_zero_ties_with_zero(backend: str) -> None:
    c = torch.tensor([[-0.0], [0.0], [-0.0]])
    _, indices = similarity_topk(torch.ones(1, 1), c, 3, backend=backend)
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores_rank_as_such(backend: str) -> None:
    c = torch.tensor([[1.0], [-3e38], [3e38], [3e38], [-3e38]])
    scores, indices = similarity_topk(torch.full((1, 1), 10.0), c, 5, backend=backend)
    assert indices.tolist() == [[2, 3, 0, 1, 4]]
    inf = float("inf")
    assert scores.tolist() == [[inf, inf, 10.0, -inf, -inf]]
    # −inf is a score; only a missing candidate has the index −1
    allowed = torch.tensor([False, True, False, False, False])
    scores, indices = similarity_topk(
        torch.full((1, 1), 10.0), c, 2, allowed=allowed, backend=backend
    )
    assert (scores.tolist(), indices.tolist()) == ([[-inf, -inf]], [[1, -1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_autocast_keep_float32_products(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 64, generator=generator)
    c = torch.randn(50, 64, generator=generator).bfloat16()
    expected = similarity_topk(q, c.float(), 5, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(similarity_topk(q, c, 5, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unsorted_results_are_the_same_set(backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    q = integers(4, 6, torch.float32, generator)
    c = integers(500, 6, torch.float32, generator)
    scores, indices = similarity_topk(q, c, 30, sorted=False, backend=backend)
    expected_scores, expected = similarity_topk(q, c, 30, backend=backend)
    assert torch.equal(indices.sort(dim=1).values, expected.sort(dim=1).values)
    assert torch.equal(scores.sort(dim=1, descending=True).values, expected_scores)


@pytest.mark.parametrize("k", [1, 128, 129, 1500, 6000])
def test_more_results_than_the_fused_limit(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    q = integers(3, 5, torch.float32, generator)
    c = integers(6000, 5, torch.float32, generator)
    expected_scores, expected = numpy_topk(q, c, k)
    for backend in (None, "torch"):
        scores, indices = similarity_topk(q, c, k, backend=backend, block=700)
        np.testing.assert_array_equal(indices.numpy(), expected)
        np.testing.assert_array_equal(scores.numpy(), expected_scores)


def test_a_row_listed_twice_is_returned_twice() -> None:
    c = torch.tensor([[1.0], [2.0], [3.0]])
    scores, indices = similarity_topk(torch.ones(1, 1), c, 3, segments=[[1, 0, 1]])
    assert (scores.tolist(), indices.tolist()) == ([[2.0, 2.0, 1.0]], [[1, 1, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_never_ranks_unless_it_is_not_asked_for(backend: str) -> None:
    c = torch.arange(40.0)[:, None].repeat(1, 3)
    c[7, 1] = float("nan")
    q = torch.ones(2, 3)
    for options in (
        {},
        {"allowed": torch.arange(40) < 8},
        {"segments": [[1, 2], [7]]},
        {"normalize": True},
        {"block": 1},
    ):
        with pytest.raises(ValueError, match="score is NaN"):
            similarity_topk(q, c, 2, backend=backend, **options)
    assert similarity_topk(q, c, 1, allowed=torch.arange(40) != 7, backend=backend)[1].tolist() == [
        [39],
        [39],
    ]
    _, indices = similarity_topk(q, c, 2, segments=[[6, 8], []], backend=backend)
    assert indices.tolist() == [[8, 6], [-1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_overflows_is_no_zero_score(backend: str) -> None:
    c = torch.tensor([[1e30, 1e30], [1.0, 0.0]])
    q = torch.tensor([[1e-5, 1e-5]])
    with pytest.raises(ValueError, match="a norm overflows"):
        similarity_topk(q, c, 1, normalize=True, backend=backend)
    zero = torch.zeros(1, 2)
    scores, indices = similarity_topk(zero, c[1:], 1, normalize=True, backend=backend)
    assert (scores.tolist(), indices.tolist()) == ([[0.0]], [[0]])


class Slices:
    """A corpus that only slices, and remembers what was read."""

    def __init__(self, rows: Any, dtype: Any = None) -> None:
        self._rows = rows
        self.shape = list(rows.shape)
        self.dtype = rows.dtype if dtype is None else dtype
        self.read: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> Any:
        self.read.append((rows.start, rows.stop))
        return self._rows[rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", ">f4"])
def test_memory_mapped_and_sliced_corpora_rank_as_tensors(
    tmp_path: Path, dtype: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(6)
    c = torch.randn(1000, 24, generator=generator).half().float()
    q = torch.randn(5, 24, generator=generator)
    mapped = np.memmap(tmp_path / "c", dtype=dtype, mode="w+", shape=(1000, 24))
    mapped[:] = c.numpy()
    mapped.flush()
    mapped = np.memmap(tmp_path / "c", dtype=dtype, mode="r", shape=(1000, 24))
    allowed = torch.rand(5, 1000, generator=generator) < 0.5
    lists = [torch.randperm(1000, generator=generator)[: 100 * i] for i in range(5)]
    held = c.half() if dtype == "float16" else c
    for corpus in (mapped, Slices(mapped), np.array(mapped), Slices(held)):
        for options in (
            {"normalize": True},
            {"allowed": allowed},
            {"segments": lists, "allowed": allowed, "normalize": True},
        ):
            expected = similarity_topk(q, held, 30, backend=backend, **options)
            for block in (None, 256, 1024):
                got = similarity_topk(q, corpus, 30, block=block, backend=backend, **options)
                same(got, expected)


def test_bfloat16_of_a_mapped_safetensors_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    c = torch.randn(700, 16, generator=generator).bfloat16()
    q = torch.randn(3, 16, generator=generator).bfloat16()
    save_file({"c": c}, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        same(
            similarity_topk(q, Slices(file.get_tensor("c")), 9, block=256),
            similarity_topk(q, c, 9),
        )


def test_segments_read_only_the_blocks_they_name() -> None:
    corpus = Slices(torch.randn(2048, 4, generator=torch.Generator().manual_seed(8)))
    _, indices = similarity_topk(
        torch.ones(2, 4), corpus, 2, segments=[[300, 2000], [301]], block=256
    )
    assert corpus.read == [(256, 512), (1792, 2048)]
    assert sorted(indices.flatten().tolist()) == [-1, 300, 301, 2000]


def test_what_a_corpus_reads_wrong_is_an_error() -> None:
    class Short(Slices):
        def __getitem__(self, rows: slice) -> Any:
            return super().__getitem__(slice(rows.start, rows.start + 1))  # would broadcast

    q = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"rows 0 … 255 of c have shape \(1, 4\)"):
        similarity_topk(q, Short(torch.ones(600, 4)), 1, block=256)
    with pytest.raises(ValueError, match="c must be float32, float16 or bfloat16, got float64"):
        similarity_topk(q, np.ones((3, 4)), 1)
    with pytest.raises(TypeError, match="list has no shape"):
        similarity_topk(q, [[1.0] * 4], 1)

    class Torn(Slices):
        def __getitem__(self, rows: slice) -> Any:
            if rows.start:
                raise OSError("the disk is gone")
            return super().__getitem__(rows)

    with pytest.raises(OSError, match="the disk is gone"):
        similarity_topk(q, Torn(torch.ones(600, 4)), 1, block=256)


@pytest.mark.parametrize(
    ("q", "c", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 5, "k is 5"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "k is 0"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, "k is 1, but must be 1 … 0"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, "3 columns and c has 2"),
        (torch.ones(3), torch.ones(4, 3), 1, "q must be a matrix"),
        (torch.ones(2, 3), np.ones(3, dtype=np.float32), 1, "c must be a matrix"),
        (torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int64), 1, "c must be float32"),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), 1, "c on meta"),
        (torch.full((1, 3), float("nan")), torch.ones(4, 3), 1, "NaN"),
        (torch.zeros(1, 3), torch.full((4, 3), float("inf")), 1, "NaN"),
    ],
)
def test_bad_matrices_are_named(q: torch.Tensor, c: Any, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_topk(q, c, k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"allowed": torch.ones(5, dtype=torch.bool)}, r"allowed must be bool \[4\] or \[2, 4\]"),
        ({"allowed": torch.ones(4)}, "got torch.float32"),
        ({"segments": [[0]]}, "1 segments for 2 queries"),
        ({"segments": [[0], [4]]}, "name row 4, but c has 4 rows"),
        ({"segments": [[0], [-1]]}, "name row -1"),
        ({"segments": [[0], [1.5]]}, "vectors of int64"),
        ({"segments": [[0], [[1]]]}, "vectors of int64"),
        ({"segments": (torch.tensor([0, 1]), torch.tensor([0, 1]))}, r"must be \[3\], got \[2\]"),
        ({"segments": (torch.tensor([0, 1]), torch.tensor([0, 2, 1]))}, "rise from 0 to the 2"),
        ({"segments": (torch.tensor([0, 1]), torch.tensor([0, 2, 3]))}, "rise from 0 to the 2"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_topk(torch.ones(2, 3), torch.ones(4, 3), 1, **options)


def test_a_backend_asked_for_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    q, c = torch.ones(1, 3), torch.ones(200, 3)
    with pytest.raises(BackendError, match="its tensors are on cpu"):
        similarity_topk(q, c, 1, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="'triton' of operation 'similarity_topk' cannot run"):
        similarity_topk(q, c, 1, backend=Backend.TRITON)
    with pytest.raises(BackendError, match="more than 128 results per query"):
        similarity_topk(q, c, 129, backend="triton")
    with pytest.raises(BackendError, match="segments are scored by PyTorch"):
        similarity_topk(q, c, 1, segments=[[0]], backend="triton")
    monkeypatch.setenv("UME_BACKEND", "similarity_topk:torch")
    assert dispatch.explain("similarity_topk", q, c).backend is Backend.TORCH
    assert similarity_topk(q, c, 1)[1].tolist() == [[0]]


def test_compiled_graphs_hold_one_operator_without_a_break() -> None:
    generator = torch.Generator().manual_seed(9)
    q = torch.randn(4, 12, generator=generator, requires_grad=True)
    c = torch.randn(300, 12, generator=generator)
    allowed = torch.rand(300, generator=generator) < 0.5

    def search(q: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return similarity_topk(q * 2, c, 7, normalize=True, allowed=allowed)

    got = torch.compile(search, fullgraph=True, backend="eager")(q, c)
    same(got, search(q, c))
    assert not got[0].requires_grad
    torch.library.opcheck(
        torch.ops.ume.similarity_topk.default,
        (q.detach(), c, 7, True, allowed, None, True, None),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_changes_nothing(backend):
    q, c = torch.randn(5, 24), torch.randn(40, 24)
    expected = similarity_topk(q, c, 7, normalize=True, backend=backend)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = similarity_topk(q, c, 7, normalize=True, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_that_negate_are_read_as_such(backend):
    q, c = torch.randn(4, 16), torch.randn(20, 16)
    for a, b in ((torch._neg_view(q), c), (q, torch._neg_view(c))):
        expected = similarity_topk(-q, c, 3, backend=backend)
        found = similarity_topk(a, b, 3, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_tuple_of_segments_is_rows_and_offsets_in_any_container():
    q, c = torch.randn(2, 8), torch.randn(9, 8)
    rows, offsets = [4, 1, 7, 0, 2], [0, 3, 5]
    expected = similarity_topk(q, c, 2, segments=(torch.tensor(rows), torch.tensor(offsets)))
    for kind in (list, np.asarray):
        found = similarity_topk(q, c, 2, segments=(kind(rows), kind(offsets)))
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("k", [2.0, True, None])
def test_k_is_an_integer(k):
    with pytest.raises(ValueError, match="k must be an integer"):
        similarity_topk(torch.randn(2, 4), torch.randn(5, 4), k)
