"""Triton kernels of the contrastive log-sum-exp and its gradient.

A program computes one tile of scores and leaves what the rows and the columns need of it: partial
maxima and sums in the forward, the weights ``u`` of the gradient in the backward. The matrix is
walked in strips of rows, so that partials and ``u`` stay within O((N + M) D). Nothing is summed
atomically: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.contrastive_loss.pairs import LseOutput, Pairs, finish
from ume_kernels.contrastive_loss.triton_pairs import (
    NO_COLUMN,
    anchored,
    below_limit,
    drop_for_both,
    exp,
    may_hold_pairs,
    place,
    scores,
    vector_counts,
)
from ume_kernels.contrastive_loss.triton_weights import weights_kernel
from ume_kernels.matrices import row_stride, rows_contiguous
from ume_kernels.triton_tiles import as_bytes
from ume_kernels.tuning import Config, config

# Ceilings for every shipped configuration.
PARTIALS_BUDGET = Budget(registers=255, shared=100_000, blocks_per_sm=1)
MERGE_BUDGET = Budget(registers=128, shared=8_192, blocks_per_sm=4)


@triton.jit(do_not_specialize=["first_row", "stop_row", "M", "offset"])
def _partials_kernel(
    row_max_ptr,
    row_sum_ptr,
    col_max_ptr,
    col_sum_ptr,
    pos_ptr,
    hard_ptr,
    hard_index_ptr,
    q_ptr,
    p_ptr,
    q_inv_ptr,
    p_inv_ptr,
    scale_ptr,
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
    """One tile: ``max_j s`` and ``sum_j exp(s - max)`` per row and, if asked for, per column.

    Rows leave theirs in ``[column tiles, rows of the strip]``, columns in ``[row tiles, M]``; the
    tile that holds a positive writes its score. ``hard_ptr`` takes the largest score but the
    positive's and ``hard_index_ptr`` its lowest column, laid out as the row partials.
    """
    row_tile, col_tile = place(first_row, stop_row, M, BLOCK_M, BLOCK_N, BAND)
    corner_row, corner_col = first_row + row_tile * BLOCK_M, col_tile * BLOCK_N
    wide_row = corner_row + tl.arange(0, BLOCK_M)
    wide_col = corner_col + tl.arange(0, BLOCK_N)
    row_inside, col_inside = wide_row < stop_row, wide_col < M
    row, col = tl.minimum(wide_row, stop_row - 1), tl.minimum(wide_col, M - 1)
    diagonal = wide_row + offset
    at_row = col_tile.to(tl.int64) * (stop_row - first_row) + (wide_row - first_row)
    at_col = row_tile.to(tl.int64) * M + wide_col

    if row_group_ptr is not None:  # noqa: SIM102 - the condition must not be compiled
        if not may_hold_pairs(row_group_ptr, col_group_ptr, row, col, diagonal):
            nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tl.store(row_max_ptr + at_row, nothing, mask=row_inside)
            tl.store(row_sum_ptr + at_row, tl.zeros([BLOCK_M], tl.float32), mask=row_inside)
            if hard_ptr is not None:
                tl.store(hard_ptr + at_row, nothing, mask=row_inside)
                no_index = tl.full([BLOCK_M], -1, tl.int32)
                tl.store(hard_index_ptr + at_row, no_index, mask=row_inside)
            if col_max_ptr is not None:
                nothing = tl.full([BLOCK_N], float("-inf"), tl.float32)
                tl.store(col_max_ptr + at_col, nothing, mask=col_inside)
                tl.store(col_sum_ptr + at_col, tl.zeros([BLOCK_N], tl.float32), mask=col_inside)
            return

    s = scores(
        q_ptr, p_ptr, q_inv_ptr, p_inv_ptr, scale_ptr, row, col,
        corner_row, corner_col, stop_row, M, q_stride, p_stride, D,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STAGES,
    )  # fmt: skip
    positive = wide_col[None, :] == diagonal[:, None]
    holds = row_inside & (diagonal >= corner_col) & (diagonal < tl.minimum(corner_col + BLOCK_N, M))
    if tl.max(holds.to(tl.int32), axis=0) > 0:
        tl.store(pos_ptr + wide_row, tl.sum(tl.where(positive, s, 0.0), axis=1), mask=holds)
    s = drop_for_both(
        s, row_group_ptr, col_group_ptr, ignore_start_ptr, ignore_col_ptr, row, col, wide_col,
        corner_col, BLOCK_N,
    )  # fmt: skip

    # Selected where it is needed: a masked copy of the tile would take a register per element.
    counts = vector_counts(col_mask_ptr, col, col_inside)[None, :]
    of_rows = s
    if row_limit_ptr is not None:
        of_rows = below_limit(s, positive, tl.load(row_limit_ptr + row)[:, None])
    top = tl.max(tl.where(counts, of_rows, float("-inf")), axis=1)
    total = tl.sum(tl.where(counts, exp(of_rows - anchored(top)[:, None]), 0.0), axis=1)
    tl.store(row_max_ptr + at_row, top, mask=row_inside)
    tl.store(row_sum_ptr + at_row, total, mask=row_inside)
    if hard_ptr is not None:
        rivals = tl.where(positive | ~counts | (of_rows != of_rows), float("-inf"), of_rows)
        hard = tl.max(rivals, axis=1)
        index = tl.where(rivals == hard[:, None], wide_col[None, :], NO_COLUMN)
        tl.store(hard_ptr + at_row, hard, mask=row_inside)
        tl.store(hard_index_ptr + at_row, tl.min(index, axis=1), mask=row_inside)

    if col_max_ptr is not None:
        counts = vector_counts(row_mask_ptr, row, row_inside)[:, None]
        of_cols = s
        if col_limit_ptr is not None:
            of_cols = below_limit(s, positive, tl.load(col_limit_ptr + col)[None, :])
        top = tl.max(tl.where(counts, of_cols, float("-inf")), axis=0)
        total = tl.sum(tl.where(counts, exp(of_cols - anchored(top)[None, :]), 0.0), axis=0)
        tl.store(col_max_ptr + at_col, top, mask=col_inside)
        tl.store(col_sum_ptr + at_col, total, mask=col_inside)


@triton.jit(do_not_specialize=["width", "tiles"])
def _merge_kernel(
    lse_ptr,
    hard_out_ptr,
    hard_index_out_ptr,
    state_max_ptr,
    state_sum_ptr,
    max_ptr,
    sum_ptr,
    hard_ptr,
    hard_index_ptr,
    width,
    tiles,
    RESUME: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """``lse = log sum_t sum_t exp(max_t)`` over partials ``[tiles, width]``, in a fixed order.

    ``state_*`` carries maximum and sum on to the partials of the next strip (RESUME: from the
    last one). The hardest negative is the largest of its partials, the first among equals.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if RESUME:
        top = tl.load(state_max_ptr + at, mask=inside, other=float("-inf"))
        total = tl.load(state_sum_ptr + at, mask=inside, other=0.0)
    hard = tl.full([BLOCK], float("-inf"), tl.float32)
    hard_index = tl.full([BLOCK], -1, tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        source = tile.to(tl.int64)[:, None] * width + at[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = tl.load(max_ptr + source, mask=mask, other=float("-inf"))
        part_sum = tl.load(sum_ptr + source, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(part, axis=0))
        # An empty partial stays as it is: the 0 it is anchored at may be far above the maximum.
        gain = exp(anchored(part) - anchored(higher)[None, :])
        part_sum *= tl.where(part == float("-inf"), 1.0, gain)
        fade = exp(anchored(top) - anchored(higher))
        total = total * tl.where(top == float("-inf"), 1.0, fade) + tl.sum(part_sum, axis=0)
        top = higher
        if hard_ptr is not None:
            rival = tl.load(hard_ptr + source, mask=mask, other=float("-inf"))
            best = tl.max(rival, axis=0)
            column = tl.load(hard_index_ptr + source, mask=mask, other=NO_COLUMN)
            column = tl.min(tl.where(rival == best[None, :], column, NO_COLUMN), axis=0)
            better = best > hard
            hard = tl.where(better, best, hard)
            hard_index = tl.where(better, column, hard_index)
    if state_max_ptr is not None:
        tl.store(state_max_ptr + at, top, mask=inside)
        tl.store(state_sum_ptr + at, total, mask=inside)
    tl.store(lse_ptr + at, anchored(top) + tl.log(total), mask=inside)
    if hard_ptr is not None:
        tl.store(hard_out_ptr + at, hard, mask=inside)
        tl.store(hard_index_out_ptr + at, hard_index.to(tl.int64), mask=inside)


# -------------------------------------------------------------------------------- launchers

MIN_PARTIALS = 1 << 24
MIN_WEIGHTS = 1 << 26
"""Elements of partials and of ``u`` that are always allowed: smaller strips would idle a GPU."""


def forward(
    q: torch.Tensor,
    p: torch.Tensor,
    q_inv: torch.Tensor | None,
    p_inv: torch.Tensor | None,
    scale: torch.Tensor,
    pairs: Pairs,
    columns: bool,
    hardest: bool,
) -> LseOutput:
    """Log-sum-exp of the rows and, if asked for, of the columns of the scores of ``pairs``.

    Args:
        q, p: ``[N, D]`` and ``[M, D]``, one of bfloat16, float16 and float32; none empty.
        q_inv, p_inv: float32 ``[N]``, ``[M]``: inverse norms; None: 1.
        scale: float32, 0-d.
    """
    n, m, d = q.shape[0], p.shape[0], q.shape[1]
    q, p = rows_contiguous(q), rows_contiguous(p)
    tiles = _tiles("partials", n, q, hardest or _selective(pairs))
    block_m, block_n = tiles["BLOCK_M"], tiles["BLOCK_N"]
    col_tiles = triton.cdiv(m, block_n)
    per_row = col_tiles * (4 if hardest else 2) + (2 * m / block_m if columns else 0)
    strip = _strip(n, max(MIN_PARTIALS, (n + m) * d // 4) / per_row, block_m)

    row_max, row_sum = q.new_empty(2, col_tiles * strip, dtype=torch.float32)
    col_max = col_sum = state_max = state_sum = hard_part = index_part = None
    row_lse = q.new_empty(n, dtype=torch.float32)
    col_lse = q.new_empty(m if columns else 0, dtype=torch.float32)
    pos = torch.full_like(row_lse, float("-inf"))
    hard = q.new_empty(n if hardest else 0, dtype=torch.float32)
    hard_index = q.new_empty(n if hardest else 0, dtype=torch.int64)
    if columns:
        col_max, col_sum = q.new_empty(2, strip // block_m * m, dtype=torch.float32)
        if strip < n:
            state_max, state_sum = q.new_empty(2, m, dtype=torch.float32)
    if hardest:
        hard_part, index_part = (
            torch.empty_like(row_max),
            torch.empty_like(row_max, dtype=torch.int32),
        )
    for first in range(0, n, strip):
        stop = min(first + strip, n)
        row_tiles = triton.cdiv(stop - first, block_m)
        _partials_kernel[(row_tiles * col_tiles,)](
            row_max, row_sum, col_max, col_sum, pos, hard_part, index_part,
            q, p, q_inv, p_inv, scale, *_conditions(pairs),
            row_stride(q), row_stride(p), first, stop, m, d, pairs.offset,
            EVEN_K=d % tiles["BLOCK_K"] == 0, **tiles,
        )  # fmt: skip
        rows = slice(first, stop)
        _merge(
            row_lse[rows], None, None, row_max, row_sum, col_tiles, False,
            *((hard[rows], hard_index[rows], hard_part, index_part) if hardest else ()),
        )  # fmt: skip
        if columns:
            _merge(col_lse, state_max, state_sum, col_max, col_sum, row_tiles, first > 0)
    return LseOutput(row_lse, col_lse, pos, hard, hard_index)


def backward(
    q: torch.Tensor,
    p: torch.Tensor,
    q_inv: torch.Tensor | None,
    p_inv: torch.Tensor | None,
    scale: torch.Tensor,
    pairs: Pairs,
    row_lse: torch.Tensor,
    col_lse: torch.Tensor,
    g_row: torch.Tensor,
    g_col: torch.Tensor | None,
    g_pos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients ``(dq, dp, dscale)`` from those of row_lse, col_lse and pos (float32).

    A strip of ``u`` is written in the dtype of the inputs and multiplied by cuBLAS, sums in
    float32. float16 cannot hold ``u`` when the inverse norms are far from 1: normalise before.
    """
    n, m, d = q.shape[0], p.shape[0], q.shape[1]
    q, p = rows_contiguous(q), rows_contiguous(p)
    tiles = _tiles("weights", n, q, _selective(pairs))
    most = max(MIN_WEIGHTS, (n + m) * d * 2 // q.element_size())
    strip = _strip(n, most / m, tiles["BLOCK_M"])
    # rows of u start at multiples of 16 bytes, as the matrix units of the library want them
    u = q.new_empty(strip, triton.cdiv(m, 8) * 8)
    dq, dp = torch.empty_like(q), torch.empty_like(p)
    grad_p = q.new_zeros(m, d, dtype=torch.float32)
    dscale = q.new_zeros((), dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, n, strip):
            stop = min(first + strip, n)
            grid = triton.cdiv(stop - first, tiles["BLOCK_M"]) * triton.cdiv(m, tiles["BLOCK_N"])
            weights_kernel[(grid,)](
                u, q, p, q_inv, p_inv, scale, row_lse, None if g_col is None else col_lse,
                g_row, g_col, g_pos, *_conditions(pairs),
                row_stride(q), row_stride(p), row_stride(u), first, stop, m, d, pairs.offset,
                EVEN_K=d % tiles["BLOCK_K"] == 0, **tiles,
            )  # fmt: skip
            rows, weights = slice(first, stop), u[: stop - first, :m]
            grad_q = _product(weights, p)
            grad_p += _product(weights.T, q[rows])
            # before the scale is multiplied in, so that a scale of 0 has a gradient, too
            dscale += torch.linalg.vecdot(q[rows].float(), grad_q).sum()
            inv = None if q_inv is None else q_inv[rows]
            finish(q[rows], inv, grad_q.mul_(scale), out=dq[rows])
        finish(p, p_inv, grad_p.mul_(scale), out=dp)
    return dq, dp, dscale


def _tiles(kernel: str, rows: int, like: torch.Tensor, selective: bool) -> Config:
    """Tile sizes and launch options: conditions on pairs take registers, float32 shared memory."""
    suffix = "_float32" if like.dtype == torch.float32 else "_selective" if selective else ""
    chosen = config("contrastive_loss", kernel + suffix, rows, like.device)
    return {**chosen, "num_stages": chosen["STAGES"]}


def _selective(pairs: Pairs) -> bool:
    """Whether anything but the shape says which pairs count."""
    return any(tensor is not None for tensor in pairs.tensors())


def _strip(rows: int, allowed: float, block: int) -> int:
    """Rows of a strip: whole tiles, at most ``allowed`` but for the first."""
    return min(max(int(allowed) // block, 1), triton.cdiv(rows, block)) * block


def _conditions(pairs: Pairs) -> tuple[torch.Tensor | None, ...]:
    """The tensors of ``pairs`` as the kernels take them."""
    return tuple(t if t is None or t.dtype != torch.bool else as_bytes(t) for t in pairs.tensors())


def _merge(
    lse: torch.Tensor,
    state_max: torch.Tensor | None,
    state_sum: torch.Tensor | None,
    part_max: torch.Tensor | None,
    part_sum: torch.Tensor | None,
    tiles: int,
    resume: bool,
    hard: torch.Tensor | None = None,
    hard_index: torch.Tensor | None = None,
    hard_part: torch.Tensor | None = None,
    index_part: torch.Tensor | None = None,
) -> None:
    chosen = config("contrastive_loss", "merge", lse.shape[0], lse.device)
    _merge_kernel[(triton.cdiv(lse.shape[0], chosen["BLOCK"]),)](
        lse, hard, hard_index, state_max, state_sum, part_max, part_sum, hard_part, index_part,
        lse.shape[0], tiles, RESUME=resume, **chosen,
    )  # fmt: skip


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` summed and kept in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
