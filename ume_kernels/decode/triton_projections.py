"""Triton kernels for the projections of a decode step: norm + QKV + RoPE + append, residual
projections, norm + gate/up + SwiGLU.

A decode step reads every weight once for a few rows, so each kernel is laid out to stream weights:
a program owns a few weight rows (output columns), walks K in software-pipelined tiles and keeps
its sums in float32 registers. RMSNorm costs no extra pass: the gain is applied to the input tile
and the row's scale, known only after the walk, multiplies the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.decode.workspace import arrival_counters
from ume_kernels.tuning import Config

# Ceilings for every shipped configuration; occupancy as predicted for sm_80 and sm_90.
QKV_BUDGET = Budget(registers=168, shared=100_000, blocks_per_sm=2)
RESIDUAL_BUDGET = Budget(registers=168, shared=100_000, blocks_per_sm=2)
GATE_UP_BUDGET = Budget(registers=200, shared=100_000, blocks_per_sm=2)


@triton.jit
def _product(x, w, acc, DOT: tl.constexpr):
    """``acc + x wᵀ`` for tiles x ``[M, K]``, w ``[N, K]``; without DOT on the scalar units."""
    if DOT:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    else:
        acc += tl.sum(x[:, None, :].to(tl.float32) * w[None, :, :].to(tl.float32), axis=2)
    return acc


@triton.jit
def _project(
    x_ptr,
    gain_ptr,
    first_ptr,
    second_ptr,
    row,
    row_mask,
    column,
    column_mask,
    start,
    stop,
    K,
    eps,
    TWO: tl.constexpr,
    NORM: tl.constexpr,
    PRENORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``x[row] · w[column]`` over K from start to stop, for one or TWO weights, in float32.

    ``x`` ``[·, K]``, weights ``[·, K]``; start is a multiple of BLOCK_K, and so is stop unless it
    is K. With NORM the input is RMS-normalised: ``x * gain`` enters the product and the row's
    ``1 / rms`` scales the sums, which needs the walk to cover all of K. PRENORM applies the scale
    to the input instead, at the price of reading it twice: float16 could overflow otherwise.

    Returns two ``[BLOCK_M, BLOCK_N]`` sums, the same one twice without TWO.
    """
    x_rows = x_ptr + row.to(tl.int64)[:, None] * K
    weight_at = column.to(tl.int64)[:, None] * K
    offset = tl.arange(0, BLOCK_K)[None, :]
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if PRENORM:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            mask = row_mask[:, None] & (k + offset < K)
            x = tl.load(x_rows + k + offset, mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        scale = tl.rsqrt(squares / K + eps)
    squares = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        at = k + offset
        inside = at < K
        x = tl.load(x_rows + at, mask=row_mask[:, None] & inside, other=0.0)
        mask = column_mask[:, None] & inside
        w = tl.load(first_ptr + weight_at + at, mask=mask, other=0.0)
        if NORM:
            gain = tl.load(gain_ptr + at, mask=inside, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            if PRENORM:
                # rounded twice, as transformers does: the normalised value, then the product
                wide = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
            else:
                squares += tl.sum(wide * wide, axis=1)
            x = (wide * gain).to(x.dtype)
        acc = _product(x, w, acc, DOT)
        if TWO:
            w2 = tl.load(second_ptr + weight_at + at, mask=mask, other=0.0)
            acc2 = _product(x, w2, acc2, DOT)
    if NORM and not PRENORM:
        inverse = tl.rsqrt(squares / K + eps)[:, None]
        acc *= inverse
        acc2 *= inverse
    return acc, acc2


@triton.jit
def _qkv_kernel(
    q_out_ptr,
    keys_ptr,
    values_ptr,
    x_ptr,
    gain_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    v_bias_ptr,
    lengths_ptr,
    offsets_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    width,
    capacity,
    positions,
    eps,
    slot_stride,
    head_stride,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PRENORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """RMSNorm, q/k/v projections with bias, RoPE at KV length + offset, append to the arena.

    A program computes PAIRS rotary pairs (columns i and i + dh/2) of one head, so that it can
    rotate them itself. Grid: (heads · pair blocks, row blocks).
    """
    eps = tl.cast(eps, tl.float32)
    head = tl.program_id(0) // tl.cdiv(HALF_DIM, PAIRS)
    block = tl.program_id(0) % tl.cdiv(HALF_DIM, PAIRS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows

    weight_ptr = q_weight_ptr
    bias_ptr = q_bias_ptr
    local = head
    if head >= HEADS + KV_HEADS:
        weight_ptr = v_weight_ptr
        bias_ptr = v_bias_ptr
        local = head - HEADS - KV_HEADS
    elif head >= HEADS:
        weight_ptr = k_weight_ptr
        bias_ptr = k_bias_ptr
        local = head - HEADS
    pair = block * PAIRS + tl.arange(0, PAIRS)
    pair_mask = pair < HALF_DIM
    column = local * (2 * HALF_DIM) + pair
    first, second = _project(
        x_ptr, gain_ptr, weight_ptr, weight_ptr + HALF_DIM * width, row, row_mask, column,
        pair_mask, 0, width, width, eps,
        True, True, PRENORM, BLOCK_M, PAIRS, BLOCK_K, DOT, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=pair_mask, other=0.0)
        first += bias.to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + HALF_DIM + column, mask=pair_mask, other=0.0)
        second += bias.to(tl.float32)[None, :]

    batch = row // QUERIES
    slot = tl.load(lengths_ptr + batch, mask=row_mask, other=0) + row % QUERIES
    position = slot
    if HAS_OFFSETS:
        position += tl.load(offsets_ptr + batch, mask=row_mask, other=0)
    # A place outside of the arena is a caller's error; writing nothing keeps it a wrong result.
    inside = row_mask & (slot >= 0) & (slot < capacity) & (position >= 0) & (position < positions)
    mask = inside[:, None] & pair_mask[None, :]
    if head < HEADS + KV_HEADS:
        angle = position[:, None] * HALF_DIM + pair[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    if head < HEADS:
        out = q_out_ptr + (row.to(tl.int64) * HEADS + head) * (2 * HALF_DIM)
    else:
        base = keys_ptr
        if head >= HEADS + KV_HEADS:
            base = values_ptr
        out = base + batch.to(tl.int64) * slot_stride + local.to(tl.int64) * head_stride
        out += slot * (2 * HALF_DIM)
    out = out[:, None] + pair[None, :]
    tl.store(out, first.to(q_out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF_DIM, second.to(q_out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_kernel(
    y_ptr,
    residual_ptr,
    x_ptr,
    weight_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    width,
    inner,
    split_blocks,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y = residual + x Wᵀ`` with W ``[width, inner]``; K is split over SPLIT programs.

    The program of a tile that arrives last adds all partial sums, in order, so the result does
    not depend on which one that is. Grid: (column blocks, row blocks, SPLIT).
    """
    tile_n, tile_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < width
    start = part * split_blocks * BLOCK_K
    stop = tl.minimum(start + split_blocks * BLOCK_K, inner)
    acc, _ = _project(
        x_ptr, x_ptr, weight_ptr, weight_ptr, row, row_mask, column, column_mask,
        start, stop, inner, 0.0,
        False, False, False, BLOCK_M, BLOCK_N, BLOCK_K, DOT, STAGES,
    )  # fmt: skip
    mine = True
    if SPLIT > 1:
        tile = tile_m * tl.num_programs(0) + tile_n
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial = partial_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + within
        tl.store(partial + part * (BLOCK_M * BLOCK_N), acc)
        # Every thread's stores come before the one thread that announces them.
        tl.debug_barrier()
        mine = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if mine:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in range(SPLIT):
                acc += tl.load(partial + other * (BLOCK_M * BLOCK_N))
            tl.store(counter_ptr + tile, 0)  # ready for the next launch
    if mine:
        mask = row_mask[:, None] & column_mask[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        # rounded before the sum, as a linear layer's output is
        acc = acc.to(residual.dtype).to(tl.float32) + residual.to(tl.float32)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_kernel(
    act_ptr,
    x_ptr,
    gain_ptr,
    gate_ptr,
    up_ptr,
    rows,
    width,
    inner,
    eps,
    PRENORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``silu(W_g m) * W_u m`` with ``m = RMSNorm(x)``; W_g and W_u ``[inner, width]``.

    A program owns BLOCK_N columns of both. Grid: (column blocks, row blocks).
    """
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate, up = _project(
        x_ptr, gain_ptr, gate_ptr, up_ptr, row, row_mask, column, column < inner, 0, width, width,
        eps, True, True, PRENORM, BLOCK_M, BLOCK_N, BLOCK_K, DOT, STAGES,
    )  # fmt: skip
    act = gate * tl.sigmoid(gate) * up
    out = act_ptr + row.to(tl.int64)[:, None] * inner + column[None, :]
    mask = row_mask[:, None] & (column < inner)[None, :]
    tl.store(out, act.to(act_ptr.dtype.element_ty), mask=mask)


def _tiles(config: Config) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k.isupper() or k == "num_warps"}


def qkv_rope_append(
    hidden: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor | None,
    queries: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    w: DecoderLayerWeights,
    shape: LayerShape,
    config: Config,
) -> torch.Tensor:
    """Rotated queries ``[M, H, dh]`` of hidden ``[M, D]``; keys and values go to the arena."""
    rows, width = hidden.shape
    q = hidden.new_empty(rows, shape.num_heads, shape.head_dim)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    half = shape.head_dim // 2
    has_bias = w.q_bias is not None
    none = hidden
    grid = (heads * triton.cdiv(half, config["PAIRS"]), triton.cdiv(rows, config["BLOCK_M"]))
    _qkv_kernel[grid](
        q, keys, values, hidden, w.input_norm, w.q_weight, w.k_weight, w.v_weight,
        w.q_bias if has_bias else none,
        w.k_bias if has_bias else none,
        w.v_bias if has_bias else none,
        lengths, lengths if offsets is None else offsets, rope[0], rope[1], rows, width,
        keys.shape[2], len(rope[0]), shape.rms_eps,
        keys.stride(0), keys.stride(1),
        QUERIES=queries, HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, HALF_DIM=half,
        HAS_BIAS=has_bias, HAS_OFFSETS=offsets is not None,
        PRENORM=hidden.dtype == torch.float16, **_tiles(config),
    )  # fmt: skip
    return q


def residual_projection(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, config: Config
) -> torch.Tensor:
    """``residual + x Wᵀ``: residual ``[M, D]``, x ``[M, I]``, W ``[D, I]``."""
    rows, inner = x.shape
    width = weight.shape[0]
    split, block_k = config["SPLIT"], config["BLOCK_K"]
    split_blocks = triton.cdiv(triton.cdiv(inner, block_k), split)
    grid = (
        triton.cdiv(width, config["BLOCK_N"]),
        triton.cdiv(rows, config["BLOCK_M"]),
        split,
    )
    y = torch.empty_like(residual)
    partial, counters = y, y  # not read
    if split > 1:
        tile = config["BLOCK_M"] * config["BLOCK_N"]
        partial = x.new_empty(grid[0] * grid[1] * split * tile, dtype=torch.float32)
        counters = arrival_counters(x.device, grid[0] * grid[1])
    _residual_kernel[grid](
        y, residual, x, weight, partial, counters, rows, width, inner, split_blocks,
        **_tiles(config),
    )  # fmt: skip
    return y


def gate_up(
    hidden: torch.Tensor, w: DecoderLayerWeights, shape: LayerShape, config: Config
) -> torch.Tensor:
    """``silu(W_g m) * W_u m`` ``[M, I]`` of hidden ``[M, D]``."""
    rows, width = hidden.shape
    inner = w.gate_weight.shape[0]
    act = hidden.new_empty(rows, inner)
    grid = (triton.cdiv(inner, config["BLOCK_N"]), triton.cdiv(rows, config["BLOCK_M"]))
    _gate_up_kernel[grid](
        act, hidden, w.post_norm, w.gate_weight, w.up_weight, rows, width, inner, shape.rms_eps,
        PRENORM=hidden.dtype == torch.float16, **_tiles(config),
    )  # fmt: skip
    return act
