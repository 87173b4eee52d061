"""Routing inside the kernels of the latent transition: probabilities, gates, auxiliary losses."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_experts(  # noqa: ANN201
    z_ptr,
    context_ptr,
    step_ptr,
    step_embed_ptr,
    router_weight_ptr,
    router_bias_ptr,
    excluded_ptr,
    z_stride,
    context_stride,
    step_value,
    max_steps,
    rows,
    row_mask,
    D: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Probabilities ``[ROWS, BLOCK_E]`` over all experts, and the same with 0 where not chosen."""
    experts = tl.arange(0, BLOCK_E)
    real = experts < E
    cols = tl.arange(0, BLOCK_D)
    if step_ptr is not None:
        step = tl.load(step_ptr + rows * STEP_PER_ROW, mask=row_mask, other=0).to(tl.int64)
    else:
        step = tl.zeros_like(rows).to(tl.int64) + step_value
    step = tl.minimum(tl.maximum(step, 0), max_steps - 1)
    acc = tl.zeros([ROWS, BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + cols
        mask = row_mask[:, None] & (d < D)[None, :]
        at = rows[:, None].to(tl.int64)
        x = tl.load(z_ptr + at * z_stride + d[None, :], mask=mask, other=0.0)
        if context_ptr is not None:
            # in the dtype of z, as the definition adds them: the choice hangs on it
            there = context_ptr + at * context_stride + d[None, :]
            added = x.to(tl.float32) + tl.load(there, mask=mask, other=0.0).to(tl.float32)
            x = added.to(x.dtype)
        emb = tl.load(step_embed_ptr + step[:, None] * D + d[None, :], mask=mask, other=0.0)
        where = router_weight_ptr + experts[:, None] * (2 * D) + d[None, :]
        w_mask = real[:, None] & (d < D)[None, :]
        w_x = tl.load(where, mask=w_mask, other=0.0).to(tl.float32)
        w_emb = tl.load(where + D, mask=w_mask, other=0.0).to(tl.float32)
        acc += x.to(tl.float32)[:, None, :] * w_x[None, :, :]
        acc += emb.to(tl.float32)[:, None, :] * w_emb[None, :, :]
    bias = tl.load(router_bias_ptr + experts, mask=real, other=0.0).to(tl.float32)
    logits = tl.sum(acc, axis=2) + bias[None, :]
    allowed = real
    if excluded_ptr is not None:
        allowed = allowed & (tl.load(excluded_ptr + experts, mask=real, other=1) == 0)
    logits = tl.where(allowed[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = powers / tl.sum(powers, axis=1)[:, None]
    # k times the largest, the lowest index where several are
    left = tl.where(real[None, :], probs, -1.0)
    # NaN is never the largest: kept, so that it shows in the output
    chosen = probs != probs
    for _ in tl.static_range(TOP_K):
        best = tl.max(left, axis=1)
        first = tl.min(tl.where(left == best[:, None], experts[None, :], BLOCK_E), axis=1)
        this = experts[None, :] == first[:, None]
        chosen = chosen | this
        left = tl.where(this, -1.0, left)
    return probs, tl.where(chosen & real[None, :], probs, 0.0)


@triton.jit
def store_routing(
    probs_ptr,
    gates_ptr,
    probs,
    gates,
    rows,
    row_mask,
    E: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write a tile of ``probs`` ``[B, E]`` and ``gates`` ``[B, E']``, the shared expert's last."""
    experts = tl.arange(0, BLOCK_E)
    mask = row_mask[:, None] & (experts < E)[None, :]
    tl.store(probs_ptr + rows[:, None] * E + experts[None, :], probs, mask=mask)
    width: tl.constexpr = E + HAS_SHARED
    tl.store(gates_ptr + rows[:, None] * width + experts[None, :], gates, mask=mask)
    if HAS_SHARED:
        tl.store(gates_ptr + rows * width + E, tl.zeros_like(rows).to(tl.float32) + 1, row_mask)


@triton.jit
def used_experts(gates, axis: tl.constexpr):  # noqa: ANN201
    """1 for every expert that some row of the tile chose, and its place among those."""
    used = tl.max((gates != 0.0).to(tl.int32), axis=axis)
    return used, tl.cumsum(used, axis=0) - used


@triton.jit
def auxiliary_losses(
    aux_ptr,
    probs_ptr,
    B,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """``[balance loss, router entropy]``, see ``reference.auxiliary``."""
    experts = tl.arange(0, BLOCK_E)
    real = experts < E
    sums = tl.zeros([BLOCK_E], tl.float32)
    squares = tl.zeros([BLOCK_E], tl.float32)
    entropy = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        mask = (rows < B)[:, None] & real[None, :]
        p = tl.load(probs_ptr + rows[:, None] * E + experts[None, :], mask=mask, other=0.0)
        sums += tl.sum(p, axis=0)
        off = tl.where(mask, p - 1.0 / E, 0.0)
        squares += tl.sum(off * off, axis=0)
        entropy += tl.sum(p * tl.log(tl.maximum(p, 1e-8)), axis=0)
    rows_f = B * 1.0
    if PER_SAMPLE:
        balance = tl.sum(squares, axis=0) / (rows_f * E)
    else:
        off = tl.where(real, sums / rows_f - 1.0 / E, 0.0)
        balance = tl.sum(off * off, axis=0) / E
    tl.store(aux_ptr, balance)
    tl.store(aux_ptr + 1, -tl.sum(entropy, axis=0) / rows_f)
