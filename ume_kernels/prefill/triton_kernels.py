"""Triton kernels of the packed prefill: memory-bound, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ume_kernels import tuning
from ume_kernels.aot import Budget

ROOM = "prefill"


@triton.jit
def _rms_norm_kernel(Y_ptr, X_ptr, W_ptr, x_row_stride, width, eps, BLOCK: tl.constexpr):
    """y = w * round(x / sqrt(mean(x²) + eps)), one row per program."""
    row = tl.program_id(0).to(tl.int64)
    eps = tl.cast(eps, tl.float32)
    cols = tl.arange(0, BLOCK)
    live = cols < width
    x = tl.load(X_ptr + row * x_row_stride + cols, mask=live, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    # transformers rounds the normalised value before the weight
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    w = tl.load(W_ptr + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(Y_ptr + row * width + cols, (w * normed).to(x.dtype), mask=live)


@triton.jit
def _rotate(first, second, cos1, cos2, sin1, sin2, dtype: tl.constexpr):
    """Both halves of x * cos + cat(-x2, x1) * sin; each product is rounded, as in eager mode."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    low = (first * cos1).to(dtype).to(tl.float32) + (-second * sin1).to(dtype).to(tl.float32)
    high = (second * cos2).to(dtype).to(tl.float32) + (first * sin2).to(dtype).to(tl.float32)
    return low.to(dtype), high.to(dtype)


@triton.jit
def _rope_append_kernel(
    Q_out_ptr,
    Keys_ptr,
    Values_ptr,
    Q_ptr,
    K_ptr,
    V_ptr,
    Cos_ptr,
    Sin_ptr,
    Slots_ptr,
    Positions_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    table_stride,
    keys_stride_s,
    keys_stride_h,
    keys_stride_c,
    values_stride_s,
    values_stride_h,
    values_stride_c,
    slots_count,
    capacity,
    heads,
    kv_heads,
    HALF: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """q' = RoPE(q); K[slot, :, position] = RoPE(k); V[slot, :, position] = v, one token each.

    SECOND is where the second half of a table row begins: 0 when both halves share one.
    """
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = Q_out_ptr.dtype.element_ty
    band = tl.arange(0, BLOCK_HALF)
    in_band = band < HALF
    # the tables are rounded to the type of the heads, as transformers does
    table = token * table_stride + band
    cos1 = tl.load(Cos_ptr + table, mask=in_band, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin1 = tl.load(Sin_ptr + table, mask=in_band, other=0.0).to(dtype).to(tl.float32)[None, :]
    cos2 = cos1
    sin2 = sin1
    if SECOND > 0:
        cos2 = tl.load(Cos_ptr + table + SECOND, mask=in_band, other=0.0)
        cos2 = cos2.to(dtype).to(tl.float32)[None, :]
        sin2 = tl.load(Sin_ptr + table + SECOND, mask=in_band, other=0.0)
        sin2 = sin2.to(dtype).to(tl.float32)[None, :]

    head = tl.arange(0, BLOCK_H)
    live = (head < heads)[:, None] & in_band[None, :]
    q = Q_ptr + token * q_stride_t + head[:, None] * q_stride_h + band[None, :]
    first = tl.load(q, mask=live, other=0.0)
    second = tl.load(q + HALF, mask=live, other=0.0)
    low, high = _rotate(first, second, cos1, cos2, sin1, sin2, dtype)
    q_out = Q_out_ptr + (token * heads + head[:, None]) * (2 * HALF) + band[None, :]
    tl.store(q_out, low, mask=live)
    tl.store(q_out + HALF, high, mask=live)

    slot = tl.load(Slots_ptr + token).to(tl.int64)
    position = tl.load(Positions_ptr + token).to(tl.int64)
    # Indices cannot be checked on the host without waiting for the device; a bad one writes
    # nothing instead of somebody else's memory.
    inside = (slot >= 0) & (slot < slots_count) & (position >= 0) & (position < capacity)
    kv = tl.arange(0, BLOCK_KV)
    kv_live = (kv < kv_heads)[:, None] & in_band[None, :]
    written = (kv < tl.where(inside, kv_heads, 0))[:, None] & in_band[None, :]
    k = K_ptr + token * k_stride_t + kv[:, None] * k_stride_h + band[None, :]
    first = tl.load(k, mask=kv_live, other=0.0)
    second = tl.load(k + HALF, mask=kv_live, other=0.0)
    low, high = _rotate(first, second, cos1, cos2, sin1, sin2, dtype)
    kv = kv.to(tl.int64)
    keys = Keys_ptr + slot * keys_stride_s + position * keys_stride_c
    keys = keys + kv[:, None] * keys_stride_h + band[None, :]
    tl.store(keys, low, mask=written)
    tl.store(keys + HALF, high, mask=written)

    v = V_ptr + token * v_stride_t + kv[:, None] * v_stride_h + band[None, :]
    values = Values_ptr + slot * values_stride_s + position * values_stride_c
    values = values + kv[:, None] * values_stride_h + band[None, :]
    tl.store(values, tl.load(v, mask=kv_live, other=0.0), mask=written)
    tl.store(values + HALF, tl.load(v + HALF, mask=kv_live, other=0.0), mask=written)


@triton.jit
def _silu_mul_kernel(
    Y_ptr, Gate_ptr, Up_ptr, y_row_stride, gate_row_stride, up_row_stride, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = round(silu(gate)) * up; ``Y_ptr`` may be ``Gate_ptr``."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    gate = tl.load(Gate_ptr + row * gate_row_stride + cols, mask=live, other=0.0)
    up = tl.load(Up_ptr + row * up_row_stride + cols, mask=live, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(Y_ptr + row * y_row_stride + cols, (silu * up).to(gate.dtype), mask=live)


RMS_NORM_BUDGET = Budget(registers=40, shared=2048, blocks_per_sm=8)
ROPE_APPEND_BUDGET = Budget(registers=48, shared=2048, blocks_per_sm=5)
SILU_MUL_BUDGET = Budget(registers=40, shared=2048, blocks_per_sm=8)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[…, N]`` as rows ``[R, N]`` whose values are adjacent; a copy only where needed."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Launch ``_rms_norm_kernel``; arguments as ``ume_kernels.prefill.rms_norm``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = _rows(x)
    count, width = rows.shape
    config = tuning.config(ROOM, "rms_norm", count, x.device)
    _rms_norm_kernel[(count,)](
        y,
        rows,
        weight.contiguous(),
        rows.stride(0),
        width,
        eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return y


def rope_append_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Launch ``_rope_append_kernel``; arguments as ``ume_kernels.prefill.rope_append``."""
    tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    half, kv_heads = dim // 2, k.shape[1]
    config = tuning.config(ROOM, "rope_append", tokens, q.device)
    _rope_append_kernel[(tokens,)](
        out,
        keys,
        values,
        q,
        k,
        v,
        cos,
        sin,
        slots.contiguous(),
        positions.contiguous(),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.shape[1],
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        keys.shape[0],
        keys.shape[2],
        heads,
        kv_heads,
        HALF=half,
        SECOND=0 if cos.shape[1] == half else half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_KV=triton.next_power_of_2(kv_heads),
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return out


def silu_mul_triton(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch ``_silu_mul_kernel``; ``out`` may be ``gate``, whose rows must then be adjacent."""
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    gates, ups = _rows(gate), _rows(up)
    into = gates if out is gate else out.view(gates.shape)
    count, width = gates.shape
    config = tuning.config(ROOM, "silu_mul", count, gate.device)
    block = config["BLOCK"]
    _silu_mul_kernel[(count, triton.cdiv(width, block))](
        into,
        gates,
        ups,
        into.stride(0),
        gates.stride(0),
        ups.stride(0),
        width,
        BLOCK=block,
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return out
