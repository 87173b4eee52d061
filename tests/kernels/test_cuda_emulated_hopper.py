"""The CUDA kernels for sm_90a, run on the host by tests/emulator/hopper.h, against float64 NumPy.

The emulator compiles the device code that nvcc compiles: main loop, barriers, copies into swizzled
shared memory, descriptors, products and epilogues. See that file for what it makes fail.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import emulated
from emulated import ELEMENTS, Forward, Gradients, Scores, Topk, address, call

EMPTY = np.iinfo(np.int64).min
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


P, I64 = ctypes.c_void_p, ctypes.c_int64


@pytest.fixture
def library() -> ctypes.CDLL:
    lib = emulated.kernels("sm90")
    for name in ("product", "mistake"):
        getattr(lib, name).restype = ctypes.c_char_p
    return lib


def vectors(count: int, depth: int, dtype: torch.dtype, seed: int, stride: int = 0) -> torch.Tensor:
    """Rows on a sphere, as rows of a wider matrix of NaN when stride > depth."""
    x = torch.randn(
        count, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = x / x.norm(dim=1, keepdim=True)
    whole = torch.full((count, max(stride, depth)), torch.nan, dtype=dtype)
    whole[:, :depth] = x.to(dtype)
    return whole[:, :depth]


class Problem:
    """Scores and which pairs count, in float64, beside the structure that the kernels take."""

    def __init__(
        self, n: int, m: int, depth: int, dtype: torch.dtype, *, offset: int = 0,
        scale: float = 20.0, inverse: bool = False, masks: bool = False, groups: bool = False,
        ignore: bool = False, limits: bool = False, stride: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(n * m + depth)
        q = vectors(n, depth, dtype, 1, stride)
        p = vectors(m, depth, dtype, 2, stride)
        for i in range(n):  # positives that look like their rows
            if 0 <= i + offset < m:
                mixed = p[i + offset].double() + q[i].double()
                p[i + offset] = (mixed / mixed.norm()).to(dtype)
        q_inv = torch.rand(n) + 0.5 if inverse else None
        p_inv = torch.rand(m) + 0.5 if inverse else None
        s = scale * (q.double() @ p.double().T).numpy()
        if inverse:
            s = s * q_inv.double().numpy()[:, None] * p_inv.double().numpy()
        self.s, self.n, self.m, self.scale_value = s, n, m, scale
        self.factor = np.ones((n, m))
        if inverse:
            self.factor = np.outer(q_inv.double(), p_inv.double())
        row_mask = torch.from_numpy(rng.random(n) > 0.2) if masks else None
        col_mask = torch.from_numpy(rng.random(m) > 0.2) if masks else None
        row_group = torch.from_numpy(rng.integers(0, 3, n, dtype=np.int32)) if groups else None
        col_group = torch.from_numpy(rng.integers(0, 3, m, dtype=np.int32)) if groups else None
        ignored = rng.random((n, m)) < 0.02 if ignore else np.zeros((n, m), bool)
        start = np.concatenate([[0], np.cumsum(ignored.sum(1))]).astype(np.int64)
        ignore_start = torch.from_numpy(start) if ignore else None
        ignore_col = torch.from_numpy(np.nonzero(ignored)[1].astype(np.int32)) if ignore else None
        # Limits half way between two scores, so that rounding does not decide.
        row_limit = self._limits(s, rng, limits, axis=1)
        col_limit = self._limits(s, rng, limits, axis=0)
        self.diagonal = np.arange(m) == np.arange(n)[:, None] + offset
        allowed = ~ignored
        if groups:
            allowed &= row_group.numpy()[:, None] == col_group.numpy()
        self.by_row, self.by_col = allowed.copy(), allowed.copy()
        if masks:
            self.by_row &= col_mask.numpy()
            self.by_col &= row_mask.numpy()[:, None]
        if limits:
            self.by_row &= (s <= row_limit.double().numpy()[:, None]) | self.diagonal
            self.by_col &= (s <= col_limit.double().numpy()) | self.diagonal
        self.dtype = dtype
        self.kept = [q, p, q_inv, p_inv, torch.tensor(scale), row_mask, col_mask, row_group,
                     col_group, ignore_start, ignore_col, row_limit, col_limit]  # fmt: skip
        self.scores = Scores(
            address(q), address(p), ELEMENTS[dtype], n, m, depth, q.stride(0), p.stride(0),
            address(q_inv), address(p_inv), address(self.kept[4]), offset,
            *[address(t) for t in self.kept[5:]],
        )  # fmt: skip

    @staticmethod
    def _limits(
        s: np.ndarray, rng: np.random.Generator, on: bool, axis: int
    ) -> torch.Tensor | None:
        if not on:
            return None
        ordered = np.sort(s, axis=axis)
        if axis == 0:
            ordered = ordered.T
        at = rng.integers(ordered.shape[1] // 2, ordered.shape[1] - 1, len(ordered))
        rows = np.arange(len(ordered))
        return torch.from_numpy((ordered[rows, at] + ordered[rows, at + 1]) / 2).float()

    def lse(self, axis: int) -> np.ndarray:
        counts = self.by_row if axis == 1 else self.by_col
        with np.errstate(divide="ignore"):
            return np.logaddexp.reduce(np.where(counts, self.s, -np.inf), axis=axis)


CASES = {
    "one tile": {"n": 5, "m": 7, "depth": 8},
    "odd sizes": {"n": 130, "m": 301, "depth": 72, "offset": 3},
    "wide rows": {"n": 70, "m": 270, "depth": 40, "stride": 64, "inverse": True},
    "far scores": {"n": 129, "m": 259, "depth": 8, "scale": 400.0},
    "negative offset": {"n": 200, "m": 130, "depth": 136, "offset": -70},
    "everything": {"n": 150, "m": 290, "depth": 24, "offset": 9, "inverse": True, "masks": True,
                   "groups": True, "ignore": True, "limits": True},
    "walks": {"n": 400, "m": 530, "depth": 16, "masks": True, "ignore": True},
}  # fmt: skip
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@TYPES
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 8), (130, 300, 72), (65, 513, 328)])
def test_products(library, dtype, n, m, depth):
    q, p = vectors(n, depth, dtype, 3), vectors(m, depth, dtype, 4)
    s = torch.full((n, m), torch.nan)
    message = library.product(
        P(q.data_ptr()),
        P(p.data_ptr()),
        ELEMENTS[dtype],
        I64(n),
        I64(m),
        I64(depth),
        P(s.data_ptr()),
    )
    assert message is None, message.decode()
    torch.testing.assert_close(s.double(), q.double() @ p.double().T, rtol=0, atol=1e-6)


@TYPES
@ALL_CASES
def test_contrastive_forward(library, dtype, case):
    problem = Problem(dtype=dtype, **case)
    n, m = problem.n, problem.m
    row_lse, pos, hard = torch.full((n,), torch.nan), torch.full((n,), -torch.inf), torch.empty(n)
    hard_index = torch.empty(n, dtype=torch.int64)
    col = torch.tensor([[-torch.inf, 0.0]]).repeat(m, 1)
    out = Forward(*[address(t) for t in (row_lse, col, pos, hard, hard_index)], None)
    call(library.contrastive_forward, problem.scores, out)
    tolerance = {"rtol": 1e-5, "atol": 2e-5 * problem.scale_value / 20}
    np.testing.assert_allclose(row_lse.double(), problem.lse(1), **tolerance)
    np.testing.assert_allclose((col[:, 0] + col[:, 1].log()).double(), problem.lse(0), **tolerance)
    exists = problem.diagonal.any(1)
    expected = np.where(exists, np.where(problem.diagonal, problem.s, 0).sum(1), -np.inf)
    np.testing.assert_allclose(pos.double(), expected, **tolerance)
    rivals = np.where(problem.by_row & ~problem.diagonal, problem.s, -np.inf)
    np.testing.assert_allclose(hard.double(), rivals.max(1), **tolerance)
    found = hard_index.numpy()
    assert ((found < 0) == np.isneginf(rivals.max(1))).all()
    chosen = rivals[np.arange(n), np.maximum(found, 0)]
    np.testing.assert_allclose(chosen, rivals.max(1), **tolerance)


def test_forward_of_rows_only_takes_the_lowest_of_equal_negatives(library):
    problem = Problem(100, 600, 16, torch.bfloat16)
    problem.kept[1][1:] = problem.kept[1][0]
    row_lse, pos, hard = torch.empty(100), torch.full((100,), -torch.inf), torch.empty(100)
    hard_index = torch.empty(100, dtype=torch.int64)
    out = Forward(address(row_lse), None, *[address(t) for t in (pos, hard, hard_index)], None)
    call(library.contrastive_forward, problem.scores, out)
    assert hard_index.tolist() == [1] + [0] * 99


@TYPES
@ALL_CASES
def test_contrastive_gradient(library, dtype, case):
    problem = Problem(dtype=dtype, **case)
    n, m = problem.n, problem.m
    generator = torch.Generator().manual_seed(5)
    g_row, g_pos = torch.rand(n, generator=generator), -torch.rand(n, generator=generator)
    g_col = torch.rand(m, generator=generator)
    lse = [problem.lse(1), problem.lse(0)]
    row_lse, col_lse = (torch.from_numpy(x).float() for x in lse)
    stride = (m + 7) // 8 * 8
    u = torch.full((n, stride), torch.nan, dtype=dtype)
    inputs = (row_lse, col_lse, g_row, g_col, g_pos, u)
    call(library.contrastive_gradient, problem.scores,
         Gradients(*[address(t) for t in inputs], stride))  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):
        by_row = np.where(problem.by_row, np.exp(problem.s - lse[0][:, None]), 0)
        by_col = np.where(problem.by_col, np.exp(problem.s - lse[1]), 0)
    t = g_row.double().numpy()[:, None] * by_row + g_col.double().numpy() * by_col
    t += g_pos.double().numpy()[:, None] * problem.diagonal
    expected = t * problem.factor
    unit = 2**-8 if dtype is torch.bfloat16 else 2**-11  # of rounding u, relative
    error = 1e-4 * max(problem.scale_value / 20, 1) ** 2
    np.testing.assert_allclose(
        u[:, :m].double(), expected, rtol=unit + error, atol=error + (2**-14 if unit < 2**-9 else 0)
    )


def search(library, q, c, k, *, splits=1, first=0, best=None, allowed=None, inverse=None):
    """(keys [Q, splits, k], whether a NaN was met)."""
    queries, n = q.shape[0], c.shape[0]
    rows = (queries + 127) // 128 * 128
    buffer = torch.full((rows, splits, 512), 77, dtype=torch.int64)
    keys = torch.full((queries, splits, k), 88, dtype=torch.int64)
    invalid = torch.zeros(1, dtype=torch.int32)
    if best is None:
        best = torch.full((queries, k), EMPTY, dtype=torch.int64)
    q_inv, c_inv = inverse if inverse is not None else (None, None)
    stride = 0 if allowed is None or allowed.ndim == 1 else n
    call(library.similarity_topk, Topk(
        address(q), address(c), ELEMENTS[q.dtype], queries, n, q.shape[1], q.stride(0), c.stride(0),
        address(q_inv), address(c_inv), address(allowed), stride, first, k, address(best),
        best.shape[1], splits, address(buffer), address(keys), address(invalid),
    ))  # fmt: skip
    return keys, bool(invalid)


def decode(keys: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores and indices of [Q, splits, k] keys, best first; -inf and -1 where empty."""
    ordered = torch.sort(keys.flatten(1), dim=1, descending=True).values.numpy()
    high = (ordered >> 32).astype(np.int32)
    bits = high ^ ((high >> 31) & 0x7FFFFFFF)
    index = 0xFFFFFFFF - (ordered & 0xFFFFFFFF)
    empty = ordered == EMPTY
    return np.where(empty, -np.inf, bits.view(np.float32)), np.where(empty, -1, index)


def integers(count: int, depth: int, seed: int, dtype: torch.dtype, most: int = 3) -> torch.Tensor:
    """Small integers: scores are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (count, depth), generator=generator).to(dtype)


def best_of(s: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of every row, equal ones by index."""
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(s, order, axis=1), order


@TYPES
@pytest.mark.parametrize(
    ("queries", "n", "depth", "k", "splits"),
    [(1, 1, 8, 1, 1), (3, 40, 24, 7, 3), (130, 1100, 72, 100, 2), (140, 1300, 8, 128, 1)],
)
def test_topk_with_many_equal_scores(library, dtype, queries, n, depth, k, splits):
    q, c = integers(queries, depth, 6, dtype), integers(n, depth, 7, dtype)
    keys, invalid = search(library, q, c, k, splits=splits, first=1000)
    scores, index = decode(keys)
    assert not invalid
    expected, where = best_of((q.double() @ c.double().T).numpy(), k)
    np.testing.assert_array_equal(scores[:, :k], expected)
    np.testing.assert_array_equal(index[:, :k], where + 1000)
    assert (scores[:, k * splits :] == -np.inf).all()


def test_topk_of_an_ascending_corpus(library):
    """Every candidate beats those before it, so every buffer fills up again and again."""
    q = torch.ones(70, 8, dtype=torch.bfloat16)
    n = 2100
    c = torch.zeros(n, 8, dtype=torch.bfloat16)
    c[:, 0] = torch.arange(n) // 128 * 128
    c[:, 1] = torch.arange(n) % 128
    scores, index = decode(search(library, q, c, 100, splits=2)[0])
    np.testing.assert_array_equal(index[:, :100], np.tile(np.arange(n - 1, n - 101, -1), (70, 1)))
    np.testing.assert_array_equal(scores[:, :100], index[:, :100])


def test_topk_continues_from_the_keys_found_before(library):
    q, c = integers(20, 16, 8, torch.float16), integers(900, 16, 9, torch.float16)
    expected, where = best_of((q.double() @ c.double().T).numpy(), 10)
    for first, then in [(slice(0, 400), slice(400, 900)), (slice(400, 900), slice(0, 400))]:
        found = search(library, q, c[first], 10, first=first.start)[0].flatten(1)
        more = search(library, q, c[then], 10, first=then.start, best=found)[0].flatten(1)
        scores, index = decode(torch.cat([found, more], dim=1)[:, None])
        np.testing.assert_array_equal(scores[:, :10], expected)
        np.testing.assert_array_equal(index[:, :10], where)


@pytest.mark.parametrize("per_query", [False, True])
def test_topk_of_allowed_candidates_with_factors(library, per_query):
    q, c = vectors(66, 48, torch.bfloat16, 10), vectors(600, 48, torch.bfloat16, 11)
    rng = np.random.default_rng(12)
    allowed = torch.from_numpy(rng.random((66, 600) if per_query else 600) < 0.3)
    allowed[..., :590] &= torch.arange(590) > 300
    inverse = (torch.rand(66) + 0.5, torch.rand(600) + 0.5)
    keys, _ = search(library, q, c, 20, splits=2, allowed=allowed, inverse=inverse)
    scores, index = decode(keys)
    s = (q.double() @ c.double().T * inverse[0].double()[:, None] * inverse[1].double()).numpy()
    s = np.where(allowed.numpy(), s, -np.inf)
    np.testing.assert_allclose(scores[:, :20], best_of(s, 20)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        scores[:, :20], np.take_along_axis(s, index[:, :20], axis=1), rtol=0, atol=1e-6
    )
    assert all(len(set(row)) == 20 for row in index[:, :20].tolist())


def test_topk_reports_nan_of_allowed_candidates_only(library):
    q, c = integers(4, 8, 13, torch.bfloat16), integers(300, 8, 14, torch.bfloat16)
    c[270] = torch.nan
    assert search(library, q, c, 5)[1]
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[270] = False
    keys, invalid = search(library, q, c, 5, allowed=allowed)
    assert not invalid
    s = (q.double() @ c.double().T).numpy()
    np.testing.assert_array_equal(decode(keys)[0], best_of(np.where(np.isnan(s), -np.inf, s), 5)[0])


def test_topk_where_some_splits_have_no_candidates(library):
    q, c = integers(130, 8, 15, torch.bfloat16), integers(300, 8, 16, torch.bfloat16)
    keys, _ = search(library, q, c, 6, splits=5)
    scores, index = decode(keys)
    expected, where = best_of((q.double() @ c.double().T).numpy(), 6)
    np.testing.assert_array_equal(scores[:, :6], expected)
    np.testing.assert_array_equal(index[:, :6], where)
    assert (index[:, 12:] == -1).all()


def test_a_matrix_the_copy_engine_cannot_read_is_refused(library):
    q = torch.zeros(4, 12, dtype=torch.bfloat16)
    s = torch.empty(4, 4)
    message = library.product(
        P(q.data_ptr()), P(q.data_ptr()), 2, I64(4), I64(4), I64(12), P(s.data_ptr())
    )
    assert b"multiple of 8" in message


def test_the_emulator_notices_mistakes(library):
    ones = torch.ones(128, 64, dtype=torch.bfloat16)
    seen = ctypes.c_float()

    def mistake(which: int) -> str | None:
        message = library.mistake(which, P(ones.data_ptr()), ctypes.byref(seen))
        return None if message is None else message.decode()

    assert "in flight" in mistake(0)
    assert np.isnan(seen.value)  # read before the copy had landed
    assert "more arrivals" in mistake(1)
    assert "without wgmma_fence" in mistake(2)
    assert "changed under a product" in mistake(3)
    assert np.isnan(seen.value)  # read before wgmma_wait
    assert "every thread waits" in mistake(4)
    assert mistake(5) is None
