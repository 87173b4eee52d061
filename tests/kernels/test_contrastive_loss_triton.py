"""The Triton kernels of the contrastive loss in the interpreter, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_kernels.contrastive_loss.pairs import Pairs, inverse_norms
from ume_kernels.triton_backend import interpreting

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not interpreting(), reason="tests/gpu has the compiled kernels"),
]

OPTIONS = ("row_mask", "col_mask", "groups", "ignore", "row_limit", "col_limit")


def draw_pairs(n: int, m: int, offset: int, options: set[str], scores: torch.Tensor) -> Pairs:
    start = cols = None
    if "ignore" in options:
        dropped = torch.rand(n, m) < 0.15
        start = torch.cat([torch.zeros(1, dtype=torch.int64), dropped.sum(1).cumsum(0)])
        cols = dropped.nonzero()[:, 1].int()
    groups = "groups" in options
    return Pairs(
        offset=offset,
        row_mask=torch.rand(n) < 0.8 if "row_mask" in options else None,
        col_mask=torch.rand(m) < 0.8 if "col_mask" in options else None,
        row_group=torch.randint(0, 3, (n,), dtype=torch.int32) if groups else None,
        col_group=torch.randint(0, 3, (m,), dtype=torch.int32) if groups else None,
        ignore_start=start,
        ignore_col=cols,
        row_limit=between(scores, 0.7) if "row_limit" in options else None,
        col_limit=between(scores.T, 0.6) if "col_limit" in options else None,
    )


def between(scores: torch.Tensor, share: float) -> torch.Tensor:
    """A limit per row with that share of the scores below it, and none so near as to round."""
    ranked = torch.nn.functional.pad(scores, (1, 0), value=-9.0).sort(1).values
    at = int(share * (ranked.shape[1] - 1))
    return (ranked[:, at] + ranked[:, at + 1]) / 2


def counted(pairs: Pairs, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row pairs, column pairs, positives) as bool matrices, by a loop over the pairs."""
    n, m = s.shape
    lists = [None if t is None else t.tolist() for t in pairs.tensors()]
    row_mask, col_mask, row_group, col_group, start, cols, row_limit, col_limit = lists
    scores = s.tolist()
    in_rows, in_cols, positive = (torch.zeros(n, m, dtype=torch.bool) for _ in range(3))
    for i in range(n):
        ignored: set[int] = set()
        if start is not None and cols is not None:
            ignored = set(cols[start[i] : start[i + 1]])
        for j in range(m):
            own = j == i + pairs.offset
            positive[i, j] = own
            both = j not in ignored
            if row_group is not None and col_group is not None:
                both &= row_group[i] == col_group[j]
            row, col = both, both
            if col_mask is not None:
                row &= col_mask[j]
            if row_mask is not None:
                col &= row_mask[i]
            if row_limit is not None:
                row &= own or scores[i][j] <= row_limit[i]
            if col_limit is not None:
                col &= own or scores[i][j] <= col_limit[j]
            in_rows[i, j], in_cols[i, j] = row, col
    return in_rows, in_cols, positive


def run(n, m, d, offset, options, normalize, dtype=torch.float32, scale=4.0, **changes):
    """Kernels and definition on the same inputs, gradients included; asserts that they agree."""
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    q, p = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    q_inv, p_inv = (inverse_norms(q), inverse_norms(p)) if normalize else (None, None)
    factor = torch.tensor(scale if normalize else scale / math.sqrt(d))

    wide_q, wide_p = q.double().requires_grad_(), p.double().requires_grad_()
    wide_scale = factor.double().requires_grad_()
    unit = torch.nn.functional.normalize if normalize else lambda x: x
    s = wide_scale * unit(wide_q) @ unit(wide_p).T
    columns, hardest = changes.pop("columns", True), changes.pop("hardest", True)
    pairs = draw_pairs(n, m, offset, options, s.detach().float())
    in_rows, in_cols, positive = counted(pairs, s.detach().float())

    out = kernels.forward(q, p, q_inv, p_inv, factor, pairs, columns, hardest)
    low = float("-inf")
    row_lse = s.masked_fill(~in_rows, low).logsumexp(1)
    col_lse = s.masked_fill(~in_cols, low).logsumexp(0)
    pos = torch.where(positive.any(1), s.masked_fill(~positive, 0).sum(1), low)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.row_lse, row_lse.float().detach(), **close)
    torch.testing.assert_close(out.pos, pos.float().detach(), **close)
    if columns:
        torch.testing.assert_close(out.col_lse, col_lse.float().detach(), **close)
    else:
        assert out.col_lse.shape == (0,)
    if hardest:
        hard, index = s.detach().masked_fill(~in_rows | positive, low).max(1)
        index[hard == low] = -1
        torch.testing.assert_close(out.hard, hard.float(), **close)
        assert out.hard_index.dtype == torch.int64
        assert torch.equal(out.hard_index, index)
    else:
        assert out.hard.shape == out.hard_index.shape == (0,)

    weights = [torch.randn(k) for k in (n, m, n)]
    weights[0][out.row_lse == low] = 0
    weights[1][col_lse == low] = 0
    weights[2][~positive.any(1)] = 0
    total = torch.zeros((), dtype=torch.float64)
    chosen = [(row_lse, weights[0]), (pos, weights[2])] + [(col_lse, weights[1])] * columns
    for value, weight in chosen:
        finite = value != low
        total = total + (value[finite] * weight[finite]).sum()
    expected = torch.autograd.grad(total, (wide_q, wide_p, wide_scale))
    got = kernels.backward(
        q, p, q_inv, p_inv, factor, pairs, out.row_lse, out.col_lse,
        weights[0], weights[1] if columns else None, weights[2],
    )  # fmt: skip
    # float16: u is rounded once, to 11 bits
    loose = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.float(), reference.float(), **loose)
    assert got[0].dtype == got[1].dtype == dtype
    return out, got


@pytest.mark.parametrize("option", [*OPTIONS, None, "all"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_option_equals_the_definition(option, normalize):
    torch.manual_seed(1)
    options = set(OPTIONS) if option == "all" else {option} - {None}
    run(37, 70, 20, 5, options, normalize)


@settings(max_examples=settings.default.max_examples // 6)
@given(
    n=st.integers(1, 45),
    m=st.integers(1, 45),
    d=st.integers(1, 40),
    offset=st.integers(-40, 40),
    options=st.sets(st.sampled_from(OPTIONS)),
    normalize=st.booleans(),
    columns=st.booleans(),
    hardest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes(n, m, d, offset, options, normalize, columns, hardest, seed):
    torch.manual_seed(seed)
    # with one dimension there are no directions to tell apart, and gradients cancel
    run(n, m, d + 1, offset, options, normalize, columns=columns, hardest=hardest)


@pytest.mark.parametrize("options", [set(), {"row_mask", "ignore"}])
def test_float16(options):
    torch.manual_seed(2)
    run(33, 50, 32, 3, options, normalize=False, dtype=torch.float16, scale=1.0)


@pytest.mark.parametrize("options", [set(), {"groups", "col_mask"}])
def test_strips_change_nothing(monkeypatch, options):
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    torch.manual_seed(3)
    whole = run(75, 40, 16, 0, options, True)
    launches = []
    strip = kernels._strip
    monkeypatch.setattr(kernels, "MIN_PARTIALS", 1)
    monkeypatch.setattr(kernels, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(
        kernels, "_strip", lambda n, most, b: launches.append((n, b)) or strip(n, 1, b)
    )
    torch.manual_seed(3)
    strips = run(75, 40, 16, 0, options, True)
    assert len(launches) == 2 and all(n > 2 * block for n, block in launches)
    torch.testing.assert_close(strips, whole, rtol=1e-5, atol=1e-6)


def test_tiles_whose_groups_do_not_meet_are_skipped(monkeypatch):
    """Sorted groups: what a skipped tile would have read is NaN, and must not show."""
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    torch.manual_seed(4)
    n, d = 96, 16
    group = torch.arange(n, dtype=torch.int32) // 48
    q, p = torch.randn(n, d), torch.randn(n, d)
    p[48:] = float("nan")
    pairs = Pairs(row_group=group, col_group=group)
    one = torch.tensor(1.0)
    out = kernels.forward(q, p, None, None, one, pairs, True, True)
    s = q[:48] @ p[:48].T
    torch.testing.assert_close(out.row_lse[:48], s.logsumexp(1))
    torch.testing.assert_close(out.col_lse[:48], s.logsumexp(0))
    assert out.row_lse[48:].isnan().all() and out.col_lse[48:].isnan().all()
    assert (out.hard_index[48:] == -1).all()


def test_scores_far_apart():
    """exp would overflow and underflow: maxima of rows and columns are their own."""
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    q = torch.tensor([[300.0], [-300.0], [0.0]]).repeat(20, 1)
    p = torch.tensor([[1.0], [-1.0]]).repeat(25, 1)
    s = (q @ p.T).double()
    out = kernels.forward(q, p, None, None, torch.tensor(1.0), Pairs(), True, True)
    torch.testing.assert_close(out.row_lse, s.logsumexp(1).float())
    torch.testing.assert_close(out.col_lse, s.logsumexp(0).float())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_and_nan_scores_show(value):
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    torch.manual_seed(5)
    q, p = torch.rand(40, 8), torch.rand(70, 8)
    q[7] = value
    limit = torch.full((40,), 100.0)
    for pairs in (Pairs(), Pairs(row_limit=limit)):
        out = kernels.forward(q, p, None, None, torch.tensor(1.0), pairs, True, True)
        others = torch.arange(40) != 7
        torch.testing.assert_close(out.row_lse[others], (q @ p.T).logsumexp(1)[others])
        if math.isnan(value):
            assert out.row_lse[7].isnan() and out.hard_index[7] == -1
            assert out.col_lse.isnan().all()
        elif pairs.row_limit is None:
            assert out.row_lse[7] == math.inf and (out.col_lse == math.inf).all()


def test_nothing_counts():
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    q, p = torch.randn(5, 8), torch.randn(9, 8)
    pairs = Pairs(
        col_mask=torch.zeros(9, dtype=torch.bool), row_mask=torch.zeros(5, dtype=torch.bool)
    )
    one = torch.tensor(1.0)
    out = kernels.forward(q, p, None, None, one, pairs, True, True)
    low = float("-inf")
    assert (out.row_lse == low).all() and (out.col_lse == low).all() and (out.hard == low).all()
    assert (out.hard_index == -1).all()
    zeros = [torch.zeros(5), torch.zeros(9), torch.zeros(5)]
    grads = kernels.backward(q, p, None, None, one, pairs, out.row_lse, out.col_lse, *zeros)
    assert all((g == 0).all() for g in grads)


def test_the_lowest_of_equal_negatives_is_the_hardest():
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    q, p = torch.ones(40, 4), torch.ones(70, 4)
    out = kernels.forward(q, p, None, None, torch.tensor(1.0), Pairs(), False, True)
    expected = torch.zeros(40, dtype=torch.int64)
    expected[0] = 1
    assert torch.equal(out.hard_index, expected)


def test_a_scale_of_zero_has_a_gradient():
    torch.manual_seed(6)
    _, (_, _, grad) = run(20, 20, 8, 0, set(), True, scale=0.0)
    assert grad != 0
    assert grad.dtype == torch.float32


def test_strided_rows_are_read_in_place():
    from ume_kernels.contrastive_loss import triton_kernels as kernels

    torch.manual_seed(7)
    q, p = torch.randn(20, 50)[:, 3:19], torch.randn(16, 30).T
    out = kernels.forward(q, p, None, None, torch.tensor(1.0), Pairs(), True, False)
    torch.testing.assert_close(out.row_lse, (q @ p.T).logsumexp(1))
    torch.testing.assert_close(out.col_lse, (q @ p.T).logsumexp(0))
