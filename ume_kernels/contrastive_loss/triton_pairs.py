"""What a program of the contrastive loss knows of its tile: scores, and which pairs count."""

from __future__ import annotations

import triton
import triton.language as tl

from ume_kernels.triton_tiles import inner_products

_LOG2_E = tl.constexpr(1.4426950408889634)
NO_COLUMN = tl.constexpr(0x7FFFFFFF)
"""Above every column."""


@triton.jit
def exp(x):
    """``e^x``."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def anchored(x):
    """A maximum that may be subtracted: 0 for an infinite one, as in ``torch.logsumexp``."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def place(first_row, stop_row, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND):
    """(row tile, column tile) of this program; BAND row tiles share their columns in L2."""
    row_tiles = tl.cdiv(stop_row - first_row, BLOCK_M)
    column_tiles = tl.cdiv(M, BLOCK_N)
    band, rest = tl.program_id(0) // (BAND * column_tiles), tl.program_id(0) % (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    return band * BAND + rest % height, rest // height


@triton.jit
def may_hold_pairs(row_group_ptr, col_group_ptr, row, col, diagonal):
    """Whether the ranges of groups of a tile meet, or the diagonal crosses it."""
    row_group = tl.load(row_group_ptr + row)
    col_group = tl.load(col_group_ptr + col)
    meet = (tl.min(row_group, axis=0) <= tl.max(col_group, axis=0)) & (
        tl.min(col_group, axis=0) <= tl.max(row_group, axis=0)
    )
    cross = (tl.min(diagonal, axis=0) <= tl.max(col, axis=0)) & (
        tl.min(col, axis=0) <= tl.max(diagonal, axis=0)
    )
    return meet | cross


@triton.jit
def scores(
    q_ptr,
    p_ptr,
    q_inv_ptr,
    p_inv_ptr,
    scale_ptr,
    row,
    col,
    first_row,
    first_col,
    stop_row,
    M,
    q_stride,
    p_stride,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scale (q_i . p_j) / (|q_i| |p_j|)`` of a tile; ``row`` and ``col`` exist (clamped)."""
    acc = inner_products(
        q_ptr, p_ptr, first_row, first_col, stop_row, M, q_stride, p_stride, D,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STAGES,
    )  # fmt: skip
    scale = tl.load(scale_ptr).to(tl.float32)
    if q_inv_ptr is not None:
        acc *= (scale * tl.load(q_inv_ptr + row))[:, None]
    else:
        acc *= scale
    if p_inv_ptr is not None:
        acc *= tl.load(p_inv_ptr + col)[None, :]
    return acc


@triton.jit
def _drop_ignored(s, ignore_start_ptr, ignore_col_ptr, row, col, first_col, BLOCK_N: tl.constexpr):
    """``s`` with -inf at the pairs of the ignore list."""
    low = tl.load(ignore_start_ptr + row)
    stop = tl.load(ignore_start_ptr + row + 1)
    # First entry of each row that is not left of the tile, by bisection.
    high = stop
    while tl.max(high - low, axis=0) > 0:
        searching = low < high
        middle = (low + high) // 2
        left = tl.load(ignore_col_ptr + middle, mask=searching, other=0) < first_col
        low = tl.where(searching & left, middle + 1, low)
        high = tl.where(searching & ~left, middle, high)
    entry = tl.load(ignore_col_ptr + low, mask=low < stop, other=NO_COLUMN)
    while tl.min(entry, axis=0) < first_col + BLOCK_N:
        s = tl.where(col[None, :] == entry[:, None], float("-inf"), s)
        low += 1
        entry = tl.load(ignore_col_ptr + low, mask=low < stop, other=NO_COLUMN)
    return s


@triton.jit
def drop_for_both(
    s,
    row_group_ptr,
    col_group_ptr,
    ignore_start_ptr,
    ignore_col_ptr,
    row,
    col,
    wide_col,
    first_col,
    BLOCK_N: tl.constexpr,
):
    """``s`` with -inf at pairs that count in neither direction."""
    if row_group_ptr is not None:
        same = tl.load(row_group_ptr + row)[:, None] == tl.load(col_group_ptr + col)[None, :]
        s = tl.where(same, s, float("-inf"))
    if ignore_start_ptr is not None:
        s = _drop_ignored(s, ignore_start_ptr, ignore_col_ptr, row, wide_col, first_col, BLOCK_N)
    return s


@triton.jit
def vector_counts(mask_ptr, at, inside):
    """Which rows (or columns) exist and are not masked out."""
    if mask_ptr is not None:
        inside &= tl.load(mask_ptr + at) != 0
    return inside


@triton.jit
def below_limit(s, positive, limit):
    """``s`` with -inf above the limit, which the positive need not keep to.

    NaN is above no limit: it stays and shows.
    """
    return tl.where((s > limit) & ~positive, float("-inf"), s)
