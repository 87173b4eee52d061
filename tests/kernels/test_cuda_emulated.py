"""The contrastive loss's CUDA C++ kernels on the host: tests/emulator runs their blocks.

What they return is compared with float64 arithmetic on the same 16-bit inputs.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import emulated
from emulated import (
    ELEMENTS,
    SOURCES,
    Forward,
    Gradients,
    Scores,
    address,
    call,
    padded,
)

INF = float("inf")

Tensor = torch.Tensor


@pytest.fixture(params=list(SOURCES))
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return emulated.kernels(request.param)


@dataclass
class Problem:
    """A contrastive problem; `pairs` holds the optional arrays by the names of `Scores`."""

    q: Tensor
    p: Tensor
    scale: float
    offset: int = 0
    normalize: bool = False
    pairs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.q, self.p = padded(self.q), padded(self.p)
        self.scale_tensor = torch.tensor(self.scale)
        self.q_inv = 1 / self.q.float().norm(dim=1) if self.normalize else None
        self.p_inv = 1 / self.p.float().norm(dim=1) if self.normalize else None

    def structure(self) -> Scores:
        return Scores(
            q=address(self.q), p=address(self.p), element=ELEMENTS[self.q.dtype],
            rows=self.q.shape[0], columns=self.p.shape[0], depth=self.q.shape[1],
            q_stride=self.q.stride(0), p_stride=self.p.stride(0),
            q_inv=address(self.q_inv), p_inv=address(self.p_inv),
            scale=address(self.scale_tensor), offset=self.offset,
            **{name: address(t) for name, t in self.pairs.items()},
        )  # fmt: skip

    def factor(self) -> Tensor:
        """d score / d product, float64."""
        factor = torch.tensor(self.scale, dtype=torch.float64)
        if self.q_inv is not None and self.p_inv is not None:
            factor = factor * self.q_inv.double()[:, None] * self.p_inv.double()
        return factor

    def scores(self) -> Tensor:
        return self.q.double() @ self.p.double().T * self.factor()

    def counts(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs count by rows, which by columns, and which are positives."""
        rows, columns = s.shape
        positive = torch.zeros(s.shape, dtype=torch.bool)
        both = torch.ones(s.shape, dtype=torch.bool)
        pairs = self.pairs
        for i in range(rows):
            if 0 <= i + self.offset < columns:
                positive[i, i + self.offset] = True
            if "ignore_start" in pairs:
                start, stop = pairs["ignore_start"][i : i + 2].tolist()
                both[i, pairs["ignore_col"][start:stop].long()] = False
        if "row_group" in pairs:
            both &= pairs["row_group"][:, None] == pairs["col_group"]
        by_row, by_col = both.clone(), both
        if "row_limit" in pairs:
            by_row &= (s <= pairs["row_limit"][:, None].double()) | positive
        if "col_limit" in pairs:
            by_col = by_col & ((s <= pairs["col_limit"].double()) | positive)
        if "col_mask" in pairs:
            by_row = by_row & pairs["col_mask"]
        if "row_mask" in pairs:
            by_col = by_col & pairs["row_mask"][:, None]
        return by_row, by_col, positive


def normal(rows: int, depth: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator).to(dtype)


def conditions(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """Masks, groups and ignored pairs, drawn at random; some rows ignore nothing, one all."""
    g = torch.Generator().manual_seed(seed)
    ignored = torch.rand(rows, columns, generator=g) < 0.1
    ignored[::3] = False
    ignored[1] = True
    start = torch.zeros(rows + 1, dtype=torch.int64)
    start[1:] = ignored.sum(1).cumsum(0)
    return {
        "row_mask": torch.rand(rows, generator=g) < 0.8,
        "col_mask": torch.rand(columns, generator=g) < 0.8,
        "row_group": torch.randint(0, 3, (rows,), generator=g, dtype=torch.int32),
        "col_group": torch.randint(0, 3, (columns,), generator=g, dtype=torch.int32),
        "ignore_start": start,
        "ignore_col": ignored.nonzero()[:, 1].int(),
    }


def with_limits(problem: Problem) -> Problem:
    """Limits half-way between scores, so that rounding cannot decide."""
    for name, s in (("row_limit", problem.scores()), ("col_limit", problem.scores().T)):
        ordered = s.sort(dim=1).values
        middle = ordered.shape[1] * 2 // 3
        problem.pairs[name] = ordered[:, middle : middle + 2].mean(1).float()
    return problem


def plain() -> Problem:
    q, p = normal(130, 72, torch.bfloat16, 1), normal(300, 72, torch.bfloat16, 2)
    return Problem(q, p, scale=20.0, offset=2, normalize=True)


def conditioned() -> Problem:
    q, p = normal(140, 40, torch.float16, 3), normal(260, 40, torch.float16, 4)
    pairs = conditions(140, 260, 5)
    return with_limits(Problem(q, p, 30.0, offset=-3, normalize=True, pairs=pairs))


def masked_only() -> Problem:
    q, p = normal(131, 104, torch.bfloat16, 6), normal(129, 104, torch.bfloat16, 7)
    pairs = conditions(131, 129, 8)
    masks = {name: pairs[name] for name in ("row_mask", "col_mask")}
    q[~masks["row_mask"]] = 0
    p[~masks["col_mask"]] = 0
    return Problem(q, p, 1.0, offset=-400, pairs=masks)


def far_apart() -> Problem:
    """Scores hundreds apart: one exponent for a whole warp would underflow."""
    q, p = normal(40, 64, torch.bfloat16, 9), normal(280, 64, torch.bfloat16, 10)
    return Problem(q, p, 15.0, offset=200)


def far_and_conditioned() -> Problem:
    q, p = normal(40, 24, torch.float16, 11), normal(150, 24, torch.float16, 12)
    return with_limits(Problem(q, p, 40.0, offset=7, pairs=conditions(40, 150, 13)))


def very_negative() -> Problem:
    """Every score near -600, so that exp(score - 0) is nothing."""
    q = torch.ones(5, 8, dtype=torch.float16)
    return Problem(q, -q.repeat(2, 1), 75.0)


def single() -> Problem:
    return Problem(normal(1, 8, torch.bfloat16, 14), normal(1, 8, torch.bfloat16, 15), 3.0)


def without_columns() -> Problem:
    q, p = normal(3, 16, torch.bfloat16, 16), normal(9, 16, torch.bfloat16, 17)
    return Problem(q, p, 2.0, pairs={"col_mask": torch.zeros(9, dtype=torch.bool)})


def twins() -> Problem:
    """Equal columns, in different lanes, warps and tiles: the hardest is the first of them."""
    q, p = normal(20, 16, torch.bfloat16, 18), normal(1, 16, torch.bfloat16, 19)
    return Problem(q, p.repeat(290, 1), 1.0, offset=5)


PROBLEMS = [plain, conditioned, masked_only, far_apart, far_and_conditioned, very_negative, single,
            without_columns, twins]  # fmt: skip


def run_forward(
    kernels: ctypes.CDLL, problem: Problem, columns: bool = True, hardest: bool = True
) -> dict[str, Tensor]:
    rows, cols = problem.q.shape[0], problem.p.shape[0]
    out = {
        "row_lse": torch.full((rows,), torch.nan),
        "col": torch.tensor([-INF, 0.0]).repeat(cols, 1),
        "pos": torch.full((rows,), -INF),
        "hard": torch.full((rows,), torch.nan),
        "hard_index": torch.full((rows,), -2, dtype=torch.int64),
    }
    call(
        kernels.contrastive_forward,
        problem.structure(),
        Forward(
            row_lse=address(out["row_lse"]), pos=address(out["pos"]),
            col=address(out["col"]) if columns else None,
            hard=address(out["hard"]) if hardest else None, hard_index=address(out["hard_index"]),
        ),
    )  # fmt: skip
    out["col_lse"] = out["col"][:, 0] + out["col"][:, 1].log()
    return out


@pytest.mark.parametrize("make", PROBLEMS)
def test_log_sums(kernels: ctypes.CDLL, make: type[Problem]) -> None:
    problem = make()
    out = run_forward(kernels, problem)
    s = problem.scores()
    by_row, by_col, positive = problem.counts(s)
    row_lse = s.masked_fill(~by_row, -INF).logsumexp(1)
    col_lse = s.masked_fill(~by_col, -INF).logsumexp(0)
    rivals = s.masked_fill(~by_row | positive, -INF)
    torch.testing.assert_close(out["row_lse"].double(), row_lse, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(out["col_lse"].double(), col_lse, rtol=1e-5, atol=2e-5)
    pos = s.masked_fill(~positive, -INF).amax(1)
    torch.testing.assert_close(out["pos"].double(), pos, rtol=1e-5, atol=2e-5)
    hard = rivals.amax(1)
    torch.testing.assert_close(out["hard"].double(), hard, rtol=1e-5, atol=2e-5)
    # The first of equals in float64 is the first in fp32 if it is ahead of all that are not equal.
    assert torch.equal(out["hard_index"] == -1, hard == -INF)
    found = hard > -INF
    assert torch.equal(out["hard_index"][found], rivals.argmax(1)[found])


def test_rows_alone(kernels: ctypes.CDLL) -> None:
    problem = plain()
    both, alone = run_forward(kernels, problem), run_forward(kernels, problem, False, False)
    for name in ("row_lse", "pos"):
        assert torch.equal(both[name], alone[name])
    assert bool(alone["hard"].isnan().all()), "written without being asked for"
    assert bool((alone["hard_index"] == -2).all())
    assert bool((alone["col"][:, 1] == 0).all())


def test_column_sums_continue(kernels: ctypes.CDLL) -> None:
    problem = far_and_conditioned()
    start = torch.linspace(-500.0, 500.0, problem.p.shape[0])
    out = {name: torch.empty(40) for name in ("row_lse", "pos")}
    col = torch.stack([start, torch.full_like(start, 2.0)], dim=1).contiguous()
    forward = Forward(row_lse=address(out["row_lse"]), pos=address(out["pos"]), col=address(col))
    call(kernels.contrastive_forward, problem.structure(), forward)
    s = problem.scores()
    here = s.masked_fill(~problem.counts(s)[1], -INF).logsumexp(0)
    expected = torch.logaddexp(here, start.double() + torch.tensor(2.0).double().log())
    torch.testing.assert_close((col[:, 0] + col[:, 1].log()).double(), expected,
                               rtol=1e-5, atol=2e-5)  # fmt: skip


def test_nan_is_seen_and_never_hardest(kernels: ctypes.CDLL) -> None:
    problem = plain()
    problem.p_inv[200] = torch.nan
    out = run_forward(kernels, problem)
    assert bool(out["row_lse"].isnan().all())
    assert out["col_lse"].isnan().nonzero().flatten().tolist() == [200]
    s = problem.scores()
    s[:, 200] = -INF
    s[problem.counts(s)[2]] = -INF
    assert torch.equal(out["hard_index"], s.argmax(1))


@pytest.mark.parametrize(
    ("make", "columns"),
    [*((make, True) for make in PROBLEMS), (plain, False), (conditioned, False)],
)
def test_gradient_factor(kernels: ctypes.CDLL, make: type[Problem], columns: bool) -> None:
    problem = make()
    s = problem.scores()
    by_row, by_col, positive = problem.counts(s)
    row_lse = s.masked_fill(~by_row, -INF).logsumexp(1).float()
    col_lse = s.masked_fill(~by_col, -INF).logsumexp(0).float()
    rows, cols = s.shape
    g_row, g_pos, g_col = (torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5
                           for n in (rows, rows, cols))  # fmt: skip
    stride = (cols + 15) // 8 * 8
    u = torch.full((rows + 1, stride), torch.nan, dtype=problem.q.dtype)
    gradients = Gradients(
        row_lse=address(row_lse), g_row=address(g_row), g_pos=address(g_pos),
        col_lse=address(col_lse) if columns else None, g_col=address(g_col) if columns else None,
        u=address(u), u_stride=stride,
    )  # fmt: skip
    call(kernels.contrastive_gradient, problem.structure(), gradients)
    t = g_row[:, None] * (s - row_lse[:, None]).masked_fill(~by_row, -INF).exp()
    if columns:
        t += g_col * (s - col_lse).masked_fill(~by_col, -INF).exp()
    t += g_pos[:, None] * positive
    expected = t * problem.factor() / problem.scale
    # Half a unit in the last place of u, and of fp32 scores of some hundreds.
    unit = torch.finfo(u.dtype).eps / 2 + 3e-4
    torch.testing.assert_close(u[:rows, :cols].double(), expected, rtol=unit, atol=1e-6)
    assert bool(u[rows:].isnan().all()), "written past the last row"
