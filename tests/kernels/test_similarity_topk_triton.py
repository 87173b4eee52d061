"""The Triton top-k scan in the interpreter, against a full sort of the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_kernels.similarity_topk.keys import EMPTY, empty_keys, unpack
from ume_kernels.triton_backend import interpreting

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not interpreting(), reason="tests/gpu has the compiled kernels"),
]


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers: scores are exact, and many are equal."""
    return torch.randint(-2, 3, shape).to(dtype)


def start(queries: int, k: int) -> torch.Tensor:
    return empty_keys(queries, k, torch.device("cpu"))


def scanned(*args, **kwargs):
    from ume_kernels.similarity_topk.triton_kernels import scan

    keys, has_nan = scan(*args, **kwargs)
    assert has_nan.shape == () and not has_nan
    return keys


def ranked(scores: torch.Tensor, k: int, allowed: torch.Tensor | None = None):
    """[(score, index)] of every row, by sorting pairs; short rows filled with (-inf, -1)."""
    out = []
    for i, row in enumerate(scores.tolist()):
        mask = None if allowed is None else (allowed if allowed.ndim == 1 else allowed[i]).tolist()
        pairs = [(-s + 0.0, j) for j, s in enumerate(row) if mask is None or mask[j]]
        best = [(-s + 0.0, j) for s, j in sorted(pairs)[:k]]
        out.append(best + [(float("-inf"), -1)] * (k - len(best)))
    return out


def found(keys: torch.Tensor):
    scores, indices = unpack(keys.sort(dim=1, descending=True).values)
    rows = zip(scores.tolist(), indices.tolist(), strict=True)
    return [[*zip(s, i, strict=True)] for s, i in rows]


@pytest.fixture
def cuts(monkeypatch):
    """Rows of scratch thresholds that were written: counts the buffers that were cut."""
    from ume_kernels.similarity_topk import triton_kernels as kernels

    untouched = -12345
    seen = []
    empty = torch.empty

    def watched(*args, **kwargs):
        made = empty(*args, **kwargs)
        if kwargs.get("dtype") == torch.int32 and made.ndim == 2:
            made.fill_(untouched)
            seen.append(made)
        return made

    monkeypatch.setattr(kernels.torch, "empty", watched)
    return lambda: sum(int((t != untouched).sum()) for t in seen)


@pytest.mark.parametrize("k", [1, 2, 7, 33, 100, 128])
def test_best_k_with_ties(k):
    torch.manual_seed(k)
    q, c = whole(19, 12), whole(201, 12)
    assert found(scanned(q, c, 0, start(19, k))) == ranked(q @ c.T, k)


@pytest.mark.parametrize(("k", "step"), [(3, 1), (20, 1), (3, 0), (3, -1)])
def test_full_buffers_are_cut(cuts, k, step):
    """Ascending scores pass every threshold; equal and descending ones stop at the first cut."""
    c = torch.arange(600.0)[:, None] * step
    q = torch.tensor([[1.0], [2.0], [-1.0]])
    assert found(scanned(q, c, 0, start(3, k))) == ranked(q @ c.T, k)
    assert cuts() > 0


@settings(max_examples=settings.default.max_examples // 5)
@given(
    queries=st.integers(1, 40),
    n=st.integers(1, 150),
    d=st.integers(1, 40),
    k=st.integers(1, 128),
    weighted=st.booleans(),
    mask=st.sampled_from([None, "row", "matrix"]),
    seed=st.integers(0, 99),
)
def test_odd_shapes(queries, n, d, k, weighted, mask, seed):
    torch.manual_seed(seed)
    q, c = whole(queries, d), whole(n, d)
    scores = q @ c.T
    q_inv = c_inv = allowed = None
    if weighted:  # powers of two: exact
        q_inv, c_inv = (2.0 ** torch.randint(-3, 4, (size,)) for size in (queries, n))
        scores = scores * q_inv[:, None] * c_inv
    if mask is not None:
        allowed = torch.rand(*((n,) if mask == "row" else (queries, n))) < 0.5
    keys = scanned(q, c, 0, start(queries, k), q_inv=q_inv, c_inv=c_inv, allowed=allowed)
    assert found(keys) == ranked(scores, k, allowed)


@pytest.mark.parametrize("order", [1, -1])
def test_parts_in_any_order_are_one_scan(order):
    """Equal scores keep the order of their indices, whichever part comes first."""
    torch.manual_seed(1)
    q, c = whole(9, 6), whole(200, 6)
    keys = start(9, 20)
    for first in list(range(0, 200, 50))[::order]:
        keys = scanned(q, c[first : first + 50], first, keys)
    assert found(keys) == ranked(q @ c.T, 20)


def test_offsets_beyond_32_bits_of_sign():
    first = 0xFFFFFFFF - 40
    q, c = torch.ones(2, 4), torch.ones(40, 4)
    keys = scanned(q, c, first, start(2, 3))
    assert found(keys) == [[(4.0, first), (4.0, first + 1), (4.0, first + 2)]] * 2


def test_blocks_of_queries_and_parts_of_the_corpus(monkeypatch):
    from ume_kernels.similarity_topk import triton_kernels as kernels

    monkeypatch.setattr(kernels, "QUERY_BLOCK", 16)
    monkeypatch.setattr(kernels, "SAMPLE", 20)
    monkeypatch.setattr(kernels, "COPIED", 64)
    torch.manual_seed(2)
    q, c = whole(37, 8), whole(170, 8)
    allowed = torch.rand(37, 170) < 0.7
    assert found(scanned(q, c, 0, start(37, 5), allowed=allowed)) == ranked(q @ c.T, 5, allowed)
    transposed = c.T.contiguous().T
    assert kernels._parts(170, True) == [(0, 20), (20, 84), (84, 148), (148, 170)]
    assert found(scanned(q, transposed, 0, start(37, 5))) == ranked(q @ c.T, 5)


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32")])
def test_half_and_mixed_precision(dtypes):
    torch.manual_seed(3)
    q, c = (whole(n, 24, dtype=getattr(torch, d)) for n, d in zip((5, 90), dtypes, strict=True))
    assert found(scanned(q, c, 0, start(5, 10))) == ranked(q.float() @ c.float().T, 10)


def test_zeros_of_either_sign_are_equal():
    q = torch.tensor([[1.0], [-1.0]])
    c = torch.tensor([[-0.0], [0.0]] * 20)
    assert found(scanned(q, c, 0, start(2, 4))) == [[(0.0, j) for j in range(4)]] * 2


def test_infinite_scores_are_ranked():
    inf = float("inf")
    q, c = torch.ones(1, 1), torch.full((70, 1), -inf)
    c[40], c[50], c[60] = inf, 3.0, inf
    expected = [(inf, 40), (inf, 60), (3.0, 50), (-inf, 0), (-inf, 1)]
    assert found(scanned(q, c, 0, start(1, 5))) == [expected]


@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_nan_is_reported_where_it_counts(value):
    from ume_kernels.similarity_topk.triton_kernels import scan

    q, c = torch.ones(3, 2), torch.ones(50, 2)
    c[31, 1] = value
    assert scan(q, c, 0, start(3, 2))[1]
    allowed = torch.ones(50, dtype=torch.bool)
    allowed[31] = False
    assert found(scanned(q, c, 0, start(3, 2), allowed=allowed)) == [[(2.0, 0), (2.0, 1)]] * 3
    matrix = allowed.expand(3, 50).clone()
    assert found(scanned(q, c, 0, start(3, 2), allowed=matrix)) == [[(2.0, 0), (2.0, 1)]] * 3


def test_nothing_to_scan():
    keys = start(3, 2)
    assert (scanned(torch.ones(3, 4), torch.ones(0, 4), 0, keys) == EMPTY).all()
    nobody = torch.zeros(9, dtype=torch.bool)
    got = scanned(torch.ones(3, 4), torch.ones(9, 4), 0, keys, allowed=nobody)
    assert (got == EMPTY).all()


def test_too_many_results_are_refused():
    from ume_kernels.similarity_topk.triton_kernels import scan

    with pytest.raises(ValueError, match="k is 129, but at most 128"):
        scan(torch.ones(1, 4), torch.ones(200, 4), 0, start(1, 129))
