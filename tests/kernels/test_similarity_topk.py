"""similarity_topk against NumPy's stable argsort, and its promises about ties and chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_kernels.similarity_topk import similarity_topk, similarity_topk_reference


def numpy_topk(q: torch.Tensor, c: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = q.double().numpy() @ c.double().numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    candidates=st.integers(1, 700),
    dim=st.integers(1, 20),
    k=st.integers(1, 700),
    chunk=st.integers(1, 600),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_small_integers_rank_exactly_as_numpy_with_many_ties(
    rows: int, candidates: int, dim: int, k: int, chunk: int, seed: int, dtype: torch.dtype
) -> None:
    # Products of small integers are exact in every dtype, so the rankings must be identical.
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, 3, (rows, dim), generator=generator).to(dtype)
    c = torch.randint(-2, 3, (candidates, dim), generator=generator).to(dtype)
    k = min(k, candidates)
    scores, indices = similarity_topk(q, c, k, chunk=chunk)
    expected_scores, expected = numpy_topk(q, c, k)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_array_equal(scores.numpy(), expected_scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_vectors_match_numpy_in_double(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(300, 40, generator=generator).to(dtype)
    c = torch.randn(2000, 40, generator=generator).to(dtype)
    scores, indices = similarity_topk(q, c, 10, chunk=300)
    expected_scores, _ = numpy_topk(q, c, 10)
    np.testing.assert_allclose(scores.numpy(), expected_scores, atol=2e-5)
    named = np.take_along_axis(q.double().numpy() @ c.double().numpy().T, indices.numpy(), axis=1)
    np.testing.assert_allclose(scores.numpy(), named, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 2, 7, 257, 300])
@pytest.mark.parametrize("candidates", [3, 255, 700, 1025])
@pytest.mark.parametrize("chunk", [1, 256, 1000, 16384])
def test_any_chunk_gives_the_bits_of_the_reference(
    queries: int, candidates: int, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(queries * candidates)
    q = torch.randn(queries, 33, generator=generator)
    c = torch.randn(candidates, 33, generator=generator)
    scores, indices = similarity_topk(q, c, min(50, candidates), chunk=chunk)
    expected_scores, expected = similarity_topk_reference(q, c, min(50, candidates))
    assert torch.equal(indices, expected)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("queries", [1, 5, 260])
@pytest.mark.parametrize("copies", [2, 255, 263, 777])
def test_copies_of_one_vector_keep_their_order(queries: int, copies: int) -> None:
    # A plain matmul fails this: the last columns are summed in another order.
    generator = torch.Generator().manual_seed(copies)
    q = torch.nn.functional.normalize(torch.randn(queries, 384, generator=generator), dim=1)
    vector = torch.nn.functional.normalize(torch.randn(1, 384, generator=generator), dim=1)
    scores, indices = similarity_topk(q, vector.expand(copies, -1), copies, chunk=256)
    assert torch.equal(indices, torch.arange(copies).expand(queries, -1))
    assert torch.equal(scores, scores[:, :1].expand(-1, copies))


def test_strides_and_alignment_of_the_inputs_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(6, 31, generator=generator)
    c = torch.randn(900, 31, generator=generator)
    expected = similarity_topk(q, c, 20)
    wide = torch.zeros(900, 33)
    wide[:, 1:32] = c
    columns = torch.zeros(31, 900).copy_(c.T).T
    for same in (wide[:, 1:32], columns):
        got = similarity_topk(q, same, 20, chunk=256)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_negative_zero_ties_with_zero() -> None:
    c = torch.tensor([[-0.0], [0.0], [-0.0]])
    _, indices = similarity_topk(torch.ones(1, 1), c, 3)
    assert indices.tolist() == [[0, 1, 2]]


def test_mixed_dtypes_and_autocast_keep_float32_products() -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 64, generator=generator)
    c = torch.randn(50, 64, generator=generator).bfloat16()
    expected = similarity_topk(q, c.float(), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity_topk(q, c, 5)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("q", "c", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 5, "k is 5"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "k is 0"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, "3 columns and c has 2"),
        (torch.ones(3), torch.ones(4, 3), 1, "q must be a matrix"),
        (torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int64), 1, "c must be float32"),
        (torch.full((1, 3), float("nan")), torch.ones(4, 3), 1, "NaN"),
        (torch.zeros(1, 3), torch.full((4, 3), float("inf")), 1, "NaN"),
    ],
)
def test_bad_arguments_are_named(q: torch.Tensor, c: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_topk(q, c, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_ranks_as_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(-2, 3, (70, 24), generator=generator).to(dtype)
    c = torch.randint(-2, 3, (3000, 24), generator=generator).to(dtype)
    scores, indices = similarity_topk(q.cuda(), c.cuda(), 40, chunk=512)
    expected_scores, expected = similarity_topk(q, c, 40)
    assert torch.equal(indices.cpu(), expected)
    assert torch.equal(scores.cpu(), expected_scores)
