"""Which pairs of a similarity matrix count, and what one pass over it returns.

The vocabulary shared by every backend of the contrastive log-sum-exp; see ``blocked.py`` for the
pass itself in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Inverses = tuple[torch.Tensor | None, torch.Tensor | None]

EPSILON = 1e-12
"""Smallest norm that is divided by, as in ``torch.nn.functional.normalize``."""


@dataclass(frozen=True)
class Pairs:
    """The pairs (i, j) that count, for N rows and M columns.

    In the row direction: ``col_mask[j]``, equal groups, not in the ignore list, and score at most
    ``row_limit[i]`` or j the positive of i. In the column direction the same with ``row_mask[i]``
    and ``col_limit[j]``. None leaves a condition out.

    Attributes:
        offset: the positive of row i is column ``i + offset``, where that exists.
        row_mask, col_mask: bool ``[N]``, ``[M]``. Rows and columns left out hold zeros.
        row_group, col_group: int32 ``[N]``, ``[M]``; both or none.
        ignore_start: int64 ``[N + 1]``; row i ignores the columns
            ``ignore_col[ignore_start[i] : ignore_start[i + 1]]``.
        ignore_col: int32 ``[E]``, ascending within a row, possibly repeated.
        row_limit, col_limit: ``[N]``, ``[M]`` in the accumulation dtype.
    """

    offset: int = 0
    row_mask: torch.Tensor | None = None
    col_mask: torch.Tensor | None = None
    row_group: torch.Tensor | None = None
    col_group: torch.Tensor | None = None
    ignore_start: torch.Tensor | None = None
    ignore_col: torch.Tensor | None = None
    row_limit: torch.Tensor | None = None
    col_limit: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Everything but the offset, in the order of the attributes."""
        return (
            self.row_mask, self.col_mask, self.row_group, self.col_group,
            self.ignore_start, self.ignore_col, self.row_limit, self.col_limit,
        )  # fmt: skip

    def contiguous(self) -> Pairs:
        """The same with vectors that kernels can read by their addresses."""
        return Pairs(self.offset, *(None if t is None else t.contiguous() for t in self.tensors()))


class LseOutput(NamedTuple):
    """What one pass returns, in the accumulation dtype (float32; float64 for float64 inputs)."""

    row_lse: torch.Tensor
    """``[N]``: log of the sum of exp(score) over the row's pairs; -inf where it has none."""
    col_lse: torch.Tensor
    """``[M]``, or ``[0]`` when columns were not asked for."""
    pos: torch.Tensor
    """``[N]``: score of the positive, -inf where it does not exist."""
    hard: torch.Tensor
    """``[N]``: largest score over the row's pairs but the positive, -inf if none. When it was not
    asked for: ``[0]``, as is ``hard_index``."""
    hard_index: torch.Tensor
    """int64 ``[N]``: its column, the lowest among equals; -1 if none. NaN never wins."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def inverse_norms(x: torch.Tensor) -> torch.Tensor:
    """``1 / max(|x_i|, 1e-12)`` of the rows of ``x [N, D]``, in their `accumulation_dtype`."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=accumulation_dtype(x.dtype))
    return norms.clamp_min(EPSILON).reciprocal()


def inverses(q: torch.Tensor, p: torch.Tensor, normalize: bool) -> Inverses:
    """`inverse_norms` of both sides, None for both without normalisation."""
    return (inverse_norms(q), inverse_norms(p)) if normalize else (None, None)


def positive_rows(rows: int, columns: int, offset: int) -> tuple[int, int]:
    """``[start, stop)`` of the rows whose positive column exists."""
    start = min(max(-offset, 0), rows)
    return start, max(min(rows, columns - offset), start)


def positive_scores(
    q: torch.Tensor,
    p: torch.Tensor,
    q_inv: torch.Tensor | None,
    p_inv: torch.Tensor | None,
    scale: torch.Tensor,
    offset: int,
) -> torch.Tensor:
    """Scores ``[N]`` of the positives, -inf where they do not exist; O(N D), rows in blocks."""
    dtype = accumulation_dtype(q.dtype)
    out = torch.full((q.shape[0],), -torch.inf, dtype=dtype, device=q.device)
    start, stop = positive_rows(q.shape[0], p.shape[0], offset)
    step = 4096
    for at in range(start, stop, step):
        rows = slice(at, min(at + step, stop))
        columns = slice(rows.start + offset, rows.stop + offset)
        score = (q[rows].to(dtype) * p[columns].to(dtype)).sum(-1) * scale
        if q_inv is not None:
            score = score * q_inv[rows]
        if p_inv is not None:
            score = score * p_inv[columns]
        out[rows] = score
    return out


def finish(
    x: torch.Tensor, inv: torch.Tensor | None, grad: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of the rows ``x [N, D]`` in their dtype, from ``grad = sum_j u_ij y_j``.

    ``u`` already holds the inverse norms, so with ``x^ = x inv`` the normalisation's backward is
    the projection ``grad - x^ (x^ . grad)``. It does not apply below `EPSILON`, where the divisor
    is constant. Rows in blocks: the temporary memory does not grow with N. `out` may be `grad`.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = 4096
    for at in range(0, x.shape[0], step):
        rows = slice(at, min(at + step, x.shape[0]))
        block = grad[rows]
        if inv is not None:
            unit = x[rows].to(grad.dtype) * inv[rows, None]
            along = (unit * block).sum(-1, keepdim=True)
            along = torch.where(inv[rows, None] < 1 / EPSILON, along, 0)
            block = torch.addcmul(block, unit, along, value=-1)
        out[rows] = block
    return out


def scale_gradient(q: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``sum_i q_i . grad_i`` (0-d) where ``scale grad`` is what `finish` takes; rows in blocks.

    Without a division by the scale, which may be 0 while it is learned.
    """
    total = grad.new_zeros(())
    step = 4096
    for at in range(0, q.shape[0], step):
        rows = slice(at, min(at + step, q.shape[0]))
        total = total + (q[rows].to(grad.dtype) * grad[rows]).sum()
    return total
