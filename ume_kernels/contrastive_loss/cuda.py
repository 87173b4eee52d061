"""The contrastive log-sum-exp by the CUDA C++ kernels; see ``blocked`` for the definitions.

Strips of rows: a strip leaves partial sums for every tile, which a second kernel merges in a fixed
order, so that the memory stays ``O((N + M) D)`` and the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ume_kernels import cuda_backend, native
from ume_kernels.contrastive_loss.pairs import LseOutput, Pairs, finish
from ume_kernels.matrices import address, matrix

Tensor = torch.Tensor

check = cuda_backend.check

MIN_PARTIALS = 64 << 20
"""Bytes of partial sums of a strip that are spent however small the inputs are."""

MIN_FACTORS = 8192 * 8192
"""Elements of a strip's gradient factor that are."""

TILE_ROWS = 128
"""Rows of a strip are a multiple of this."""


class _Scores:
    """The score matrix as the kernels take it, whole or a strip; keeps alive what it points to."""

    def __init__(
        self,
        q: Tensor,
        p: Tensor,
        q_inv: Tensor | None,
        p_inv: Tensor | None,
        scale: Tensor,
        pairs: Pairs,
    ) -> None:
        self._q, self._p = q, p
        self._q_inv, self._p_inv = (None if t is None else t.contiguous() for t in (q_inv, p_inv))
        self._scale = scale.to(device=q.device, dtype=torch.float32)
        self._pairs = pairs.contiguous()

    def strip(self, rows: slice) -> tuple[object, ...]:
        """Arguments for some rows: a problem of its own whose positives lie further right."""
        pairs = self._pairs

        def cut(t: Tensor | None) -> int:
            return 0 if t is None else address(t[rows.start :])

        return (
            matrix(self._q[rows]),
            matrix(self._p),
            cut(self._q_inv),
            address(self._p_inv),
            address(self._scale),
            pairs.offset + rows.start,
            [
                cut(pairs.row_mask),
                address(pairs.col_mask),
                cut(pairs.row_group),
                address(pairs.col_group),
                cut(pairs.ignore_start),
                address(pairs.ignore_col),
                cut(pairs.row_limit),
                address(pairs.col_limit),
            ],
        )


def forward(
    q: Tensor,
    p: Tensor,
    q_inv: Tensor | None,
    p_inv: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    columns: bool,
    hardest: bool,
) -> LseOutput:
    """Row and column log-sum-exp in one pass; see ``blocked.forward``.

    RuntimeError: a launch fails, with its name and CUDA's reason.
    """
    kernels = native.require()
    (n, d), m = q.shape, p.shape[0]
    like = q.new_empty(0, dtype=torch.float32)
    out = LseOutput(
        like.new_empty(n),
        like.new_empty(m if columns else 0),
        like.new_full((n,), -torch.inf),
        like.new_empty(n if hardest else 0),
        like.new_empty(n if hardest else 0, dtype=torch.int64),
    )
    scores = _Scores(q, p, q_inv, p_inv, scale, pairs)
    sums = None  # of the columns over the strips so far: maximum, sum relative to it
    if columns:
        sums = like.new_zeros(m, 2)
        sums[:, 0] = -torch.inf
    with torch.cuda.device(q.device):
        stream = cuda_backend.stream(q.device)
        tile = kernels.contrastive_workspace_cuda(TILE_ROWS, m, columns, hardest)
        strips = list(_strips(n, max(MIN_PARTIALS, (n + m) * d) // tile))
        largest = strips[0].stop
        size = kernels.contrastive_workspace_cuda(largest, m, columns, hardest)
        workspace = like.new_empty(size, dtype=torch.uint8)
        for rows in strips:
            kernels.contrastive_forward_cuda(
                *scores.strip(rows),
                [
                    address(out.row_lse[rows]),
                    address(sums),
                    address(out.pos[rows]),
                    address(out.hard[rows]) if hardest else 0,
                    address(out.hard_index[rows]) if hardest else 0,
                    address(workspace),
                ],
                stream,
            )
        if sums is not None:
            kernels.contrastive_finish_columns_cuda(address(sums), address(out.col_lse), m, stream)
    return out


def backward(
    q: Tensor,
    p: Tensor,
    q_inv: Tensor | None,
    p_inv: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    row_lse: Tensor,
    col_lse: Tensor,
    g_row: Tensor,
    g_col: Tensor | None,
    g_pos: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dq, dp, dscale)`` from one recomputation of the scores; see ``blocked``.

    A kernel writes a strip of the factor ``u`` in the dtype of the inputs, which cuBLAS multiplies
    with ``p`` and ``q``, sums in float32. float16 cannot hold ``u`` when the inverse norms are far
    from 1: normalise before.

    RuntimeError: a launch fails, with its name and CUDA's reason.
    """
    kernels = native.require()
    (n, d), m = q.shape, p.shape[0]
    scores = _Scores(q, p, q_inv, p_inv, scale, pairs)
    inputs = [
        None if t is None else t.contiguous()
        for t in (row_lse, None if g_col is None else col_lse, g_row, g_col, g_pos)
    ]
    width = -(-m // 8) * 8  # rows of u start at multiples of 16 bytes
    strips = list(_strips(n, max(MIN_FACTORS, (n + m) * d) // (TILE_ROWS * width)))
    u = q.new_empty(strips[0].stop, width)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dp = torch.empty_like(p, memory_format=torch.contiguous_format)
    grad_p = p.new_zeros(m, d, dtype=torch.float32)
    dscale = q.new_zeros((), dtype=torch.float32)
    with torch.cuda.device(q.device), torch.autocast("cuda", enabled=False):
        stream = cuda_backend.stream(q.device)
        for rows in strips:
            row, col, by_row, by_col, by_pos = inputs
            assert row is not None and by_row is not None and by_pos is not None
            kernels.contrastive_gradient_cuda(
                *scores.strip(rows),
                [
                    address(row[rows]),
                    address(col),
                    address(by_row[rows]),
                    address(by_col),
                    address(by_pos[rows]),
                ],
                address(u),
                width,
                stream,
            )
            factor = u[: rows.stop - rows.start, :m]
            grad_q = torch.mm(factor, p, out_dtype=torch.float32)
            grad_p += torch.mm(factor.T, q[rows], out_dtype=torch.float32)
            # before the scale is multiplied in, so that a scale of 0 has a gradient, too
            dscale += torch.linalg.vecdot(q[rows].float(), grad_q).sum()
            inv = None if q_inv is None else q_inv[rows]
            finish(q[rows], inv, grad_q.mul_(scale), out=dq[rows])
        finish(p, p_inv, grad_p.mul_(scale), out=dp)
    return dq, dp, dscale


def _strips(rows: int, tiles: int) -> Iterator[slice]:
    """Slices of at most ``max(tiles, 1)`` whole tiles; the first is the largest."""
    step = max(tiles, 1) * TILE_ROWS
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
