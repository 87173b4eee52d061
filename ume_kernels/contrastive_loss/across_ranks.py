"""Log-sum-exp of local rows over the columns of all ranks, forward and backward.

Either the columns are gathered, while the local ones are computed already, or they travel around
a ring, and the gradient of a rank's columns travels with them until it is home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ume_kernels.contrastive_loss import lse as single
from ume_kernels.contrastive_loss.exchange import Gathering, Layout, Passing, Reduction
from ume_kernels.contrastive_loss.pairs import Pairs, accumulation_dtype
from ume_kernels.contrastive_loss.prepare import slice_columns

Tensor = torch.Tensor

_COLUMNS, _GRADIENTS = 0, 1
"""Tags of the two kinds of messages in the ring."""


@dataclass(frozen=True)
class Plan:
    """What the passes need beside the tensors.

    `pairs` has the conditions of the local queries against all targets and, bidirectional, of the
    local targets against all queries; columns in global order.
    """

    layout: Layout
    pairs: tuple[Pairs, ...]
    ring: bool
    normalize: bool
    backend: str | None


class RowLse(torch.autograd.Function):
    """``(pos [n], lse [n] of the queries, and of the targets if bidirectional)``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        q, p = q.contiguous(), p.contiguous()
        sides = [(q, p), (p, q)][: len(plan.pairs)]
        if plan.ring:
            pos, sums = _forward_ring(sides, scale, plan)
            columns: list[Tensor] = []
        else:
            pos, sums, columns = _forward_gathered(sides, scale, plan)
        ctx.plan = plan
        ctx.save_for_backward(q, p, scale, *sums, *columns)
        return (pos, *sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_pos: Tensor, *g_sums: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        q, p, scale, *rest = ctx.saved_tensors
        count = len(plan.pairs)
        sums, columns = rest[:count], rest[count:]
        sides = [(q, p), (p, q)][:count]
        # The positive's score is an output once: its gradient belongs to the first side.
        gradients = [(g, g_pos if side == 0 else None) for side, g in enumerate(g_sums)]
        run = _Backward(scale, plan, sums, gradients)
        of_rows, of_columns = run.ring(sides) if plan.ring else run.gathered(sides, columns)
        dq, dp = of_rows[0], of_columns[0]
        if count == 2:
            dq, dp = dq + of_columns[1], dp + of_rows[1]
        return dq.to(q.dtype), dp.to(p.dtype), run.dscale, None


def _block(
    rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, plan: Plan
) -> tuple[Tensor, Tensor]:
    """``(lse, pos)`` of the rows over some of the columns."""
    if rows.shape[0] == 0 or columns.shape[0] == 0:
        dtype = accumulation_dtype(rows.dtype)
        nothing = torch.full((rows.shape[0],), -torch.inf, dtype=dtype, device=rows.device)
        return nothing, nothing
    out = single.forward(
        rows, columns, scale, pairs,
        normalize=plan.normalize, columns=False, backend=plan.backend,
    )  # fmt: skip
    return out.row_lse, out.pos


def _forward_gathered(
    sides: Sequence[tuple[Tensor, Tensor]], scale: Tensor, plan: Plan
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layout = plan.layout
    coming = [Gathering(columns, layout.sizes, layout.group) for _, columns in sides]
    sums, positives, gathered = [], [], []
    for (rows, columns), pairs in zip(sides, plan.pairs, strict=True):
        here = slice_columns(pairs, layout.start, layout.stop)
        lse, pos = _block(rows, columns, scale, here, plan)
        sums.append(lse)
        positives.append(pos)
    for side, (rows, _) in enumerate(sides):
        everything = coming[side].wait()
        for start, stop in ((0, layout.start), (layout.stop, layout.total)):
            there = slice_columns(plan.pairs[side], start, stop)
            lse, _ = _block(rows, everything[start:stop], scale, there, plan)
            sums[side] = torch.logaddexp(sums[side], lse)
        gathered.append(everything)
    return positives[0], sums, gathered


def _forward_ring(
    sides: Sequence[tuple[Tensor, Tensor]], scale: Tensor, plan: Plan
) -> tuple[Tensor, list[Tensor]]:
    layout = plan.layout
    held = torch.stack([columns for _, columns in sides])
    sums: list[Tensor] = []
    positives: list[Tensor] = []
    for step in range(layout.world):
        source = (layout.rank - step) % layout.world
        passing = _pass_on(held, source, plan) if step + 1 < layout.world else None
        for side, (rows, _) in enumerate(sides):
            pairs = slice_columns(plan.pairs[side], *layout.span(source))
            lse, pos = _block(rows, held[side], scale, pairs, plan)
            if step == 0:
                sums.append(lse)
                positives.append(pos)
            else:
                sums[side] = torch.logaddexp(sums[side], lse)
        if passing is not None:
            held = passing.wait()
    return positives[0], sums


def _pass_on(held: Tensor, source: int, plan: Plan, tag: int = _COLUMNS) -> Passing:
    layout = plan.layout
    size = layout.sizes[(source - 1) % layout.world]
    return Passing(held, (held.shape[0], size, held.shape[2]), layout, tag)


class _Backward:
    """Second pass: from the gradients of lse and pos to those of rows, columns and scale."""

    def __init__(
        self,
        scale: Tensor,
        plan: Plan,
        sums: Sequence[Tensor],
        gradients: Sequence[tuple[Tensor, Tensor | None]],
    ) -> None:
        self._scale, self._plan, self._sums, self._gradients = scale, plan, sums, gradients
        self.dscale = torch.zeros_like(scale)

    def gathered(
        self, sides: Sequence[tuple[Tensor, Tensor]], columns: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums over ranks what each rank's loss gives to a rank's columns."""
        dtype = self._scale.dtype
        of_rows, coming = [], []
        for side, (rows, _) in enumerate(sides):
            drows, dcolumns = self._block(side, rows, columns[side], self._plan.pairs[side])
            of_rows.append(drows.to(dtype))
            coming.append(Reduction(dcolumns, self._plan.layout))
        return of_rows, [reduction.wait(dtype) for reduction in coming]

    def ring(self, sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """The same with travelling columns, and with gradients one step behind them."""
        plan, layout, dtype = self._plan, self._plan.layout, self._scale.dtype
        held = torch.stack([columns for _, columns in sides])
        gradient = torch.zeros(held.shape, dtype=dtype, device=held.device)
        of_rows = [torch.zeros(rows.shape, dtype=dtype, device=held.device) for rows, _ in sides]
        following: Passing | None = None
        for step in range(layout.world):
            source = (layout.rank - step) % layout.world
            passing = _pass_on(held, source, plan) if step + 1 < layout.world else None
            found = []
            for side, (rows, _) in enumerate(sides):
                pairs = slice_columns(plan.pairs[side], *layout.span(source))
                drows, dcolumns = self._block(side, rows, held[side], pairs)
                of_rows[side] += drows
                found.append(dcolumns)
            if following is not None:
                gradient = following.wait()
            for side, dcolumns in enumerate(found):
                gradient[side] += dcolumns
            following = _pass_on(gradient, source, plan, _GRADIENTS)
            if passing is not None:
                held = passing.wait()
        assert following is not None
        return of_rows, list(following.wait())

    def _block(
        self, side: int, rows: Tensor, columns: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        if rows.shape[0] == 0 or columns.shape[0] == 0:
            return torch.zeros_like(rows), torch.zeros_like(columns)
        g_row, g_pos = self._gradients[side]
        plan = self._plan
        drows, dcolumns, dscale = single.backward(
            rows, columns, self._scale, pairs, self._sums[side], self._sums[side].new_empty(0),
            g_row, None, torch.zeros_like(g_row) if g_pos is None else g_pos,
            normalize=plan.normalize, backend=plan.backend,
        )  # fmt: skip
        self.dscale = self.dscale + dscale
        return drows, dcolumns


class GatherRows(torch.autograd.Function):
    """``[n, D]`` to the rows of all ranks ``[M, D]``; the backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return Gathering(x, layout.sizes, layout.group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = Reduction(grad, ctx.layout).wait(accumulation_dtype(grad.dtype))
        return total.to(grad.dtype), None
