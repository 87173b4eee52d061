"""Triton kernel for attention of a few new tokens per row over a ragged KV arena.

The G query heads that share a KV head and the Q new tokens of a row form one tile, so a row's
keys and values are read once. A row's tokens are split over SPLITS programs, by its own length:
lengths are read on the device, so a captured launch serves any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.decode.workspace import arrival_counters
from ume_kernels.tuning import Config

ATTEND_BUDGET = Budget(registers=255, shared=160_000, blocks_per_sm=1)


@triton.jit
def _attend_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    lengths_ptr,
    partial_ptr,
    stats_ptr,
    counter_ptr,
    extra,
    scale,
    capacity,
    slot_count,
    slot_stride,
    head_stride,
    HAS_SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``softmax(q Kᵀ / √dh) V`` where query i of row r sees ``lengths[r] + extra + i`` tokens.

    ``scale`` holds ``log2(e) / √dh``: the softmax runs in base 2. Programs of a row and KV head
    leave ``(max, sum, weighted values)`` in scratch; the one that arrives last merges them in
    order. Grid: (rows, KV heads, SPLITS).
    """
    scale = tl.cast(scale, tl.float32)
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = row.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    seen = tl.load(lengths_ptr + row).to(tl.int32) + extra
    total = tl.minimum(seen + (QUERIES - 1), capacity)
    # A slot that does not exist is a caller's error; reading nothing keeps it a wrong result.
    total = tl.where((slot >= 0) & (slot < slot_count), total, 0)

    packed = tl.arange(0, BLOCK_Q)
    query = packed % QUERIES
    head = kv_head * GROUP + packed // QUERIES
    packed_mask = packed < GROUP * QUERIES
    dim = tl.arange(0, BLOCK_D)
    dim_mask = dim < HEAD_DIM
    token = (row * QUERIES + query).to(tl.int64)
    at = (token * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + dim[None, :]
    mask = packed_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)

    share = tl.cdiv(tl.cdiv(total, BLOCK_KV), SPLITS) * BLOCK_KV
    start = part * share
    stop = tl.minimum(start + share, total)
    base = slot * slot_stride + kv_head.to(tl.int64) * head_stride
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in tl.range(start, stop, BLOCK_KV, num_stages=STAGES):
        key = first + tl.arange(0, BLOCK_KV)
        inside = key < stop
        # What lies beyond is never read: it may hold anything.
        kv_mask = inside[:, None] & dim_mask[None, :]
        kv_at = base + key[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(keys_ptr + kv_at, mask=kv_mask, other=0.0)
        v = tl.load(values_ptr + kv_at, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = inside[None, :] & (key[None, :] < (seen + query)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # a query that has seen nothing yet keeps weight 0 instead of -inf - -inf
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - anchor[:, None])
        fade = tl.exp2(top - anchor)
        weight = weight * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = higher

    mine = True
    if SPLITS > 1:
        pair = (row * KV_HEADS + kv_head).to(tl.int64)
        tile = packed[:, None] * BLOCK_D + dim[None, :]
        partial = partial_ptr + pair * (SPLITS * BLOCK_Q * BLOCK_D) + tile
        stats = stats_ptr + pair * (SPLITS * 2 * BLOCK_Q) + packed
        tl.store(partial + part * (BLOCK_Q * BLOCK_D), acc)
        tl.store(stats + part * (2 * BLOCK_Q), top)
        tl.store(stats + part * (2 * BLOCK_Q) + BLOCK_Q, weight)
        # Every thread's stores come before the one thread that announces them.
        tl.debug_barrier()
        mine = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel") == SPLITS - 1
        if mine:
            top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            weight = tl.zeros([BLOCK_Q], tl.float32)
            acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for other in range(SPLITS):
                their_top = tl.load(stats + other * (2 * BLOCK_Q))
                their_weight = tl.load(stats + other * (2 * BLOCK_Q) + BLOCK_Q)
                theirs = tl.load(partial + other * (BLOCK_Q * BLOCK_D))
                higher = tl.maximum(top, their_top)
                anchor = tl.where(higher == float("-inf"), 0.0, higher)
                fade = tl.exp2(top - anchor)
                gain = tl.exp2(their_top - anchor)
                weight = weight * fade + their_weight * gain
                acc = acc * fade[:, None] + theirs * gain[:, None]
                top = higher
            tl.store(counter_ptr + pair, 0)  # ready for the next launch
    if mine:
        result = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor | None,
    lengths: torch.Tensor,
    extra: int,
    config: Config,
) -> torch.Tensor:
    """Attention of q ``[R, Q, H, dh]`` over the arena; see the kernel. Returns ``[R, Q, H, dh]``.

    ``slots`` None means that row r reads slot r. ``keys`` and ``values`` must be laid out alike.
    """
    rows, queries, heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    splits = split_count(rows * kv_heads, capacity, config)
    block_q = max(16, triton.next_power_of_2(group * queries))
    block_d = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty_like(q)
    partial = stats = counters = out  # not read
    if splits > 1:
        pairs = rows * kv_heads * splits
        partial = q.new_empty(pairs * block_q * block_d, dtype=torch.float32)
        stats = q.new_empty(pairs * 2 * block_q, dtype=torch.float32)
        counters = arrival_counters(q.device, rows * kv_heads)
    _attend_kernel[(rows, kv_heads, splits)](
        out, q, keys, values, lengths if slots is None else slots, lengths, partial, stats,
        counters, extra, 1.4426950408889634 / head_dim**0.5, capacity,
        keys.shape[0], keys.stride(0), keys.stride(1),
        HAS_SLOTS=slots is not None, QUERIES=queries, GROUP=group, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, SPLITS=splits, BLOCK_Q=block_q, BLOCK_D=block_d,
        BLOCK_KV=config["BLOCK_KV"], STAGES=config["STAGES"], num_warps=config["num_warps"],
    )  # fmt: skip
    return out


def split_count(tiles: int, capacity: int, config: Config) -> int:
    """Programs per row and KV head: enough to fill the device, none without a block of keys.

    A power of two that depends on shapes only, never on lengths: it is part of a captured launch.
    """
    wanted = triton.cdiv(config["PROGRAMS"], tiles)
    blocks = triton.cdiv(capacity, config["BLOCK_KV"])
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(blocks), config["MAX_SPLITS"])
