"""The C++ contrastive log-sum-exp against its definition, written out densely in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ume_kernels import native as native_module
from ume_kernels.contrastive_loss import native
from ume_kernels.contrastive_loss.pairs import LseOutput, Pairs, inverse_norms

if native_module.module is None:
    pytest.skip(f"no native module: {native_module.missing}", allow_module_level=True)

ISAS = list(native_module.module.cpu_isas())
if "avx512f" in ISAS:  # what the loops around the matrix tiles need
    ISAS.append("amx_emulated")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Problem:
    q: torch.Tensor
    p: torch.Tensor
    normalize: bool = True
    scale: float = 20.0
    pairs: Pairs = field(default_factory=Pairs)

    def run(
        self, isa: str | None, columns: bool = True
    ) -> tuple[LseOutput, tuple[torch.Tensor, ...]]:
        """Forward and, for weights that depend on the place, backward by the native kernels."""
        inv = (inverse_norms(self.q), inverse_norms(self.p)) if self.normalize else (None, None)
        scale = torch.tensor(self.scale)
        out = native.forward(self.q, self.p, *inv, scale, self.pairs, columns, True, isa)
        g_row, g_col, g_pos = self.weights()
        grads = native.backward(
            self.q, self.p, *inv, scale, self.pairs, out.row_lse, out.col_lse if columns else None,
            g_row, g_col if columns else None, g_pos, isa,
        )  # fmt: skip
        return out, grads

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the loss by row_lse, col_lse and pos."""
        n, m = len(self.q), len(self.p)
        rows = torch.arange(n)
        g_pos = torch.where(
            (rows + self.pairs.offset >= 0) & (rows + self.pairs.offset < m), 1.0, 0
        )
        return (
            (rows % 5 - 1.5) / n, (torch.arange(m) % 3 - 0.7) / m, -g_pos * (rows % 4 + 0.5) / n
        )  # fmt: skip


def dense(problem: Problem, columns: bool = True) -> tuple[LseOutput, tuple[torch.Tensor, ...]]:
    """The definition: the whole matrix in float64, gradients by autograd."""
    q = problem.q.double().requires_grad_()
    p = problem.p.double().requires_grad_()
    scale = torch.tensor(problem.scale, dtype=torch.float64, requires_grad=True)
    a, b = q, p
    if problem.normalize:
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (q, p))
    scores = scale * (a @ b.T)
    (n, m), pairs = scores.shape, problem.pairs
    positive = torch.arange(n)[:, None] + pairs.offset == torch.arange(m)
    both = torch.ones(n, m, dtype=torch.bool)
    if pairs.row_group is not None and pairs.col_group is not None:
        both &= pairs.row_group[:, None] == pairs.col_group
    if pairs.ignore_start is not None and pairs.ignore_col is not None:
        for i in range(n):
            both[i, pairs.ignore_col[pairs.ignore_start[i] : pairs.ignore_start[i + 1]].long()] = 0
    rows_count, cols_count = both.clone(), both.clone()
    if pairs.col_mask is not None:
        rows_count &= pairs.col_mask
    if pairs.row_mask is not None:
        cols_count &= pairs.row_mask[:, None]
    if pairs.row_limit is not None:
        rows_count &= positive | (scores <= pairs.row_limit[:, None])
    if pairs.col_limit is not None:
        cols_count &= positive | (scores <= pairs.col_limit)
    by_row = scores.masked_fill(~rows_count, -torch.inf)
    by_col = scores.masked_fill(~cols_count, -torch.inf)
    row_lse, col_lse = by_row.logsumexp(1), by_col.logsumexp(0)
    exists = positive.any(1)
    pos = torch.where(exists, (scores * positive).sum(1), -torch.inf)
    hard, hard_index = by_row.masked_fill(positive, -torch.inf).max(1)
    hard_index = torch.where(hard == -torch.inf, -1, hard_index)
    g_row, g_col, g_pos = problem.weights()
    terms = [(row_lse, g_row), (pos, g_pos)] + ([(col_lse, g_col)] if columns else [])
    # a row or column without pairs takes no part, whatever weight it is given
    total = sum(
        (torch.where(g.double() * x.isfinite() != 0, x, 0) * g.double()).sum() for x, g in terms
    )
    grads = torch.autograd.grad(total, (q, p, scale))
    return LseOutput(*(x.detach() for x in (row_lse, col_lse, pos, hard, hard_index))), grads


def random(n: int, m: int, d: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, m))
    return Problem(q, p)


def with_rules(problem: Problem, seed: int = 0, groups: bool = True) -> Problem:
    """Every condition at once."""
    n, m = len(problem.q), len(problem.p)
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 3, (n,), generator=g)
    ignored = [torch.randint(0, m, (c,), generator=g).sort().values for c in counts.tolist()]
    row_group = torch.randint(0, 2, (n,), generator=g, dtype=torch.int32)
    col_group = torch.randint(0, 2, (m,), generator=g, dtype=torch.int32)
    pairs = replace(
        problem.pairs,
        row_mask=torch.rand(n, generator=g) < 0.8,
        col_mask=torch.rand(m, generator=g) < 0.8,
        row_group=row_group if groups else None,
        col_group=col_group if groups else None,
        ignore_start=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        ignore_col=torch.cat(ignored).int(),
        row_limit=torch.randn(n, generator=g) * 3 + 1,
        col_limit=torch.randn(m, generator=g) * 3 + 1,
    )
    return replace(problem, pairs=pairs)


def assert_agrees(problem: Problem, isa: str | None = None, columns: bool = True) -> None:
    out, grads = problem.run(isa, columns)
    expected, expected_grads = dense(problem, columns)
    # bf16 weights and bf16 results: each rounds to 2^-9
    tolerance = 2e-5 if problem.q.dtype is torch.float32 else 6e-3
    # the projection may leave nothing but rounding of what it was applied to
    projected = 5e-2 * problem.scale
    if problem.normalize:
        projected *= float(max(inverse_norms(problem.q).max(), inverse_norms(problem.p).max()))
    for name in ("row_lse", "col_lse", "pos", "hard") if columns else ("row_lse", "pos", "hard"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-4, msg=name
        )
    # indices may differ only between scores that rounding cannot tell apart
    differ = out.hard_index != expected.hard_index
    torch.testing.assert_close(
        out.hard[differ].double(), expected.hard[differ], rtol=1e-6, atol=1e-5
    )
    for name, found, wanted in zip(("dq", "dp", "dscale"), grads, expected_grads, strict=True):
        allowed = tolerance * (wanted.norm() + min(projected, problem.scale))
        assert (found.double() - wanted).norm() < allowed, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 3), (70, 130, 33), (131, 90, 64), (1, 1, 1)])
def test_every_instruction_set(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    assert_agrees(random(*shape, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3, -2])
def test_every_condition(isa: str, dtype: torch.dtype, offset: int) -> None:
    problem = with_rules(random(67, 71, 20, dtype))
    assert_agrees(replace(problem, pairs=replace(problem.pairs, offset=offset)), isa)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_directions_and_norms(normalize: bool, columns: bool) -> None:
    problem = replace(random(70, 75, 16, torch.float32), normalize=normalize, scale=0.7)
    assert_agrees(problem, columns=columns)
    assert_agrees(with_rules(problem), columns=columns)


def test_several_blocks_of_rows_and_columns() -> None:
    assert_agrees(random(1100, 1030, 8, torch.float32))
    assert_agrees(random(1100, 1030, 8, torch.bfloat16))


def test_groups_in_order_leave_whole_tiles_out() -> None:
    problem = random(600, 600, 8, torch.float32)
    group = (torch.arange(600) // 200).int()
    assert_agrees(replace(problem, pairs=Pairs(row_group=group, col_group=group)))


def test_rows_whose_scores_are_far_apart() -> None:
    """One exponential per tile would lose the rows that are far below the tile's largest score."""
    problem = replace(random(40, 50, 12, torch.float32), normalize=False, scale=1.0)
    factors = torch.logspace(-2, 2.3, 40)[:, None]
    assert_agrees(replace(problem, q=problem.q * factors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    problem = with_rules(random(300, 530, 24, dtype), groups=False)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = problem.run(None)
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_strided_and_unaligned_rows() -> None:
    base = torch.randn(40, 61)
    for dtype in DTYPES:
        wide = base.to(dtype)
        problem = Problem(wide[:, 1:34], wide[::2, 5:38])
        assert_agrees(problem)


def test_nan_reaches_its_row_and_column_only() -> None:
    problem = random(20, 20, 8, torch.float32)
    problem.q[3, 2] = torch.nan
    out, _ = problem.run(None)
    rows = torch.arange(20) == 3
    assert torch.equal(out.row_lse.isnan(), rows)
    assert out.col_lse.isnan().all()
    assert out.hard_index[3] == -1
    assert out.hard[~rows].isfinite().all()


def test_zero_rows_have_the_gradient_of_normalize() -> None:
    problem = random(6, 6, 5, torch.float32)
    problem.q[2] = 0
    assert_agrees(problem)


@given(
    n=st.integers(1, 80), m=st.integers(1, 80), d=st.integers(1, 40), offset=st.integers(-5, 5),
    isa=st.sampled_from(ISAS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
    rules=st.booleans(), columns=st.booleans(),
)  # fmt: skip
def test_any_shape(
    n: int, m: int, d: int, offset: int, isa: str, dtype: torch.dtype, seed: int, rules: bool,
    columns: bool,
) -> None:  # fmt: skip
    problem = random(n, m, d, dtype, seed)
    if rules:
        problem = with_rules(problem, seed)
    assert_agrees(replace(problem, pairs=replace(problem.pairs, offset=offset)), isa, columns)
