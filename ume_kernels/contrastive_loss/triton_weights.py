"""Triton kernel of the contrastive loss's backward: the weight of every pair in the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.contrastive_loss.triton_pairs import (
    anchored,
    below_limit,
    drop_for_both,
    exp,
    may_hold_pairs,
    place,
    scores,
    vector_counts,
)

WEIGHTS_BUDGET = Budget(registers=255, shared=100_000, blocks_per_sm=1)


@triton.jit(do_not_specialize=["first_row", "stop_row", "M", "offset"])
def weights_kernel(
    u_ptr,
    q_ptr,
    p_ptr,
    q_inv_ptr,
    p_inv_ptr,
    scale_ptr,
    row_lse_ptr,
    col_lse_ptr,
    grad_row_ptr,
    grad_col_ptr,
    grad_pos_ptr,
    row_mask_ptr,
    col_mask_ptr,
    row_group_ptr,
    col_group_ptr,
    ignore_start_ptr,
    ignore_col_ptr,
    row_limit_ptr,
    col_limit_ptr,
    q_stride,
    p_stride,
    u_stride,
    first_row,
    stop_row,
    M,
    D,
    offset,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """``u_ij = t_ij / (|q_i| |p_j|)`` of a strip of rows, ``[rows of the strip, M]``.

    ``t_ij = g_row[i] exp(s_ij - row_lse[i]) + g_col[j] exp(s_ij - col_lse[j])`` over the pairs
    that count in each direction, ``+ g_pos[i]`` at the positive; the scores are computed again.
    Then ``dq' = u p`` and ``dp' = uT q`` are the gradients but for scale and normalisation.
    """
    row_tile, col_tile = place(first_row, stop_row, M, BLOCK_M, BLOCK_N, BAND)
    corner_row, corner_col = first_row + row_tile * BLOCK_M, col_tile * BLOCK_N
    wide_row = corner_row + tl.arange(0, BLOCK_M)
    wide_col = corner_col + tl.arange(0, BLOCK_N)
    row_inside, col_inside = wide_row < stop_row, wide_col < M
    row, col = tl.minimum(wide_row, stop_row - 1), tl.minimum(wide_col, M - 1)
    diagonal = wide_row + offset
    corner = row_tile.to(tl.int64) * BLOCK_M * u_stride + corner_col
    local = tl.arange(0, BLOCK_M)[:, None] * u_stride + tl.arange(0, BLOCK_N)[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    dtype = u_ptr.dtype.element_ty

    if row_group_ptr is not None:  # noqa: SIM102 - the condition must not be compiled
        if not may_hold_pairs(row_group_ptr, col_group_ptr, row, col, diagonal):
            tl.store(u_ptr + corner + local, tl.zeros([BLOCK_M, BLOCK_N], dtype), mask=inside)
            return

    s = scores(
        q_ptr, p_ptr, q_inv_ptr, p_inv_ptr, scale_ptr, row, col,
        corner_row, corner_col, stop_row, M, q_stride, p_stride, D,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STAGES,
    )  # fmt: skip
    positive = wide_col[None, :] == diagonal[:, None]
    s = drop_for_both(
        s, row_group_ptr, col_group_ptr, ignore_start_ptr, ignore_col_ptr, row, col, wide_col,
        corner_col, BLOCK_N,
    )  # fmt: skip
    # Where nothing counts lse is -inf, and so is every score: exp(-inf - 0) keeps it at 0.
    counts = vector_counts(col_mask_ptr, col, col_inside)[None, :]
    of_rows = s
    if row_limit_ptr is not None:
        of_rows = below_limit(s, positive, tl.load(row_limit_ptr + row)[:, None])
    lse = anchored(tl.load(row_lse_ptr + row))
    grad = tl.load(grad_row_ptr + row)
    t = tl.where(counts, grad[:, None] * exp(of_rows - lse[:, None]), 0.0)
    if col_lse_ptr is not None:
        counts = vector_counts(row_mask_ptr, row, row_inside)[:, None]
        of_cols = s
        if col_limit_ptr is not None:
            of_cols = below_limit(s, positive, tl.load(col_limit_ptr + col)[None, :])
        lse = anchored(tl.load(col_lse_ptr + col))
        grad = tl.load(grad_col_ptr + col)
        t += tl.where(counts, grad[None, :] * exp(of_cols - lse[None, :]), 0.0)
    t += tl.where(positive, tl.load(grad_pos_ptr + row)[:, None], 0.0)
    if q_inv_ptr is not None:
        t *= tl.load(q_inv_ptr + row)[:, None]
    if p_inv_ptr is not None:
        t *= tl.load(p_inv_ptr + col)[None, :]
    tl.store(u_ptr + corner + local, t.to(dtype), mask=inside)
