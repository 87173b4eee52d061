"""Triton kernels of the latent transition, forward, and their launcher.

Two launches, nothing sorted, nothing read on the host, no atomics:

    1. hidden[e] = gelu(W1_e LayerNorm(z) + b1_e)      beside it, router and softmax
    2. out = z + sum_e g_e (W2_e hidden[e] + b2_e)     beside it, the auxiliary losses

Up to ``SELECT_MAX_ROWS`` rows every program of launch 1 finds the routing by itself, so that only
the experts some row chose are read: a step is bound by reading weights. Above that nearly every
expert is hit, so all are computed and the routing takes programs of its own.

The gates ``g`` are ``[B, E']`` float32: the probability where an expert was chosen, 0 elsewhere;
the shared expert is the last column and 1. ``E'`` counts it. Sums run in float32; the operands of
a matrix product have the dtype of ``z``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.moe_transition.triton_routing import (
    auxiliary_losses,
    route_experts,
    store_routing,
    used_experts,
)
from ume_kernels.moe_transition.weights import MoEWeights
from ume_kernels.tuning import config

FC1_SELECTED_BUDGET = Budget(registers=144, shared=40_000, blocks_per_sm=3)
FC1_ALL_BUDGET = Budget(registers=168, shared=100_000, blocks_per_sm=2)
FC2_BUDGET = Budget(registers=192, shared=132_000, blocks_per_sm=1)

SELECT_MAX_ROWS = 4
ROUTE_ROWS = 4

# ------------------------------------------------------------------------------------ parts


@triton.jit
def gelu(x):  # noqa: ANN201
    """``x Phi(x)``, exact (erf) form."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _row_stats(z_ptr, z_stride, rows, row_mask, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1/sqrt(variance + eps) of rows ``[R]``, chunks merged as Welford does.

    One pass; no cancellation where a row is far from 0.
    """
    mean = tl.zeros_like(rows).to(tl.float32)
    square = tl.zeros_like(mean)
    cols = tl.arange(0, BLOCK)
    for start in tl.range(0, D, BLOCK, num_stages=3):
        mask = row_mask[:, None] & (start + cols < D)[None, :]
        at = z_ptr + rows[:, None].to(tl.int64) * z_stride + (start + cols)[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        new = tl.minimum(D - start, BLOCK) * 1.0
        done = start * 1.0
        chunk = tl.sum(x, axis=1) / new
        off = tl.where(mask, x - chunk[:, None], 0.0)
        delta = chunk - mean
        mean += delta * (new / (done + new))
        square += tl.sum(off * off, axis=1) + delta * delta * (done * new / (done + new))
    return mean, tl.rsqrt(square / D + eps)


@triton.jit
def _normalised(
    z_ptr, z_stride, ln_weight_ptr, ln_bias_ptr, rows, mean, rstd, k, mask, k_mask
):
    """``LayerNorm(z)`` float32 at ``rows`` × ``k``, 0 outside the masks."""
    at = z_ptr + rows[:, None].to(tl.int64) * z_stride + k[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(ln_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    bias = tl.load(ln_bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _clear(counter_ptr, counters):
    """Zero what the second launch counts in: no state lasts from call to call."""
    at = tl.arange(0, 128)
    for start in range(0, counters, 128):
        tl.store(counter_ptr + start + at, tl.zeros_like(at), mask=start + at < counters)


@triton.jit
def _store_hidden(
    hidden_ptr,
    pre_ptr,
    z_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    weight_ptr,
    bias_ptr,
    z_stride,
    mean,
    rstd,
    rows,
    row_mask,
    row_base,
    n,
    k_end,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``gelu(W1 LayerNorm(z) + b1)`` at rows × columns ``n``; ``k_end`` 0 leaves memory alone."""
    width: tl.constexpr = 2 * D
    dtype = hidden_ptr.dtype.element_ty
    # nothing where k_end is 0
    n_mask = n < 2 * k_end
    cols = tl.arange(0, BLOCK_K)
    if ROWS == 1:
        # Sums stay apart per lane until the end: no shuffles inside the loop.
        lanes = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.range(0, k_end, BLOCK_K, num_stages=STAGES):
            k = start + cols
            k_mask = k < D
            w_mask = n_mask[:, None] & k_mask[None, :]
            w = tl.load(weight_ptr + n[:, None] * D + k[None, :], mask=w_mask, other=0.0)
            u = _normalised(
                z_ptr, z_stride, ln_weight_ptr, ln_bias_ptr, rows, mean, rstd, k,
                row_mask[:, None] & k_mask[None, :], k_mask,
            )  # fmt: skip
            lanes += w.to(tl.float32) * u
        acc = tl.sum(lanes, axis=1)[None, :]
    else:
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in tl.range(0, k_end, BLOCK_K, num_stages=STAGES):
            k = start + cols
            k_mask = k < D
            w_mask = n_mask[:, None] & k_mask[None, :]
            w = tl.load(weight_ptr + n[:, None] * D + k[None, :], mask=w_mask, other=0.0)
            u = _normalised(
                z_ptr, z_stride, ln_weight_ptr, ln_bias_ptr, rows, mean, rstd, k,
                row_mask[:, None] & k_mask[None, :], k_mask,
            )  # fmt: skip
            acc = tl.dot(u.to(dtype), tl.trans(w), acc, input_precision="ieee")
    acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & n_mask[None, :]
    at = (row_base + rows)[:, None].to(tl.int64) * width + n[None, :]
    tl.store(hidden_ptr + at, gelu(acc).to(dtype), mask=mask)
    if pre_ptr is not None:
        tl.store(pre_ptr + at, acc.to(dtype), mask=mask)


# ---------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["B", "step_value", "max_steps", "counters"])
def fc1_selected_kernel(
    hidden_ptr,
    pre_ptr,
    probs_ptr,
    gates_ptr,
    counter_ptr,
    z_ptr,
    context_ptr,
    step_ptr,
    step_embed_ptr,
    router_weight_ptr,
    router_bias_ptr,
    excluded_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    shared_weight_ptr,
    shared_bias_ptr,
    z_stride,
    context_stride,
    B,
    step_value,
    max_steps,
    counters,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROUTE: tl.constexpr,
    BLOCK_STAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Hidden states of the experts that some of at most ``ROWS`` rows chose, and the routing.

    Program (tile of 2D, slot): slot s is the s-th chosen expert by number; the shared expert comes
    first, it needs no routing and its reads cover the router's latency.
    """
    eps = tl.cast(eps, tl.float32)
    TILES: tl.constexpr = (2 * D + BLOCK_N - 1) // BLOCK_N
    HAS_SHARED: tl.constexpr = shared_weight_ptr is not None
    tile = tl.program_id(0) % TILES
    slot = tl.program_id(0) // TILES
    rows = tl.arange(0, ROWS)
    row_mask = rows < B
    expert = E
    k_end = D
    weight_ptr = fc1_weight_ptr
    bias_ptr = fc1_bias_ptr
    if HAS_SHARED and slot == 0:
        weight_ptr = shared_weight_ptr
        bias_ptr = shared_bias_ptr
    else:
        probs, gates = route_experts(
            z_ptr, context_ptr, step_ptr, step_embed_ptr, router_weight_ptr, router_bias_ptr,
            excluded_ptr, z_stride, context_stride, step_value, max_steps, rows, row_mask,
            D, E, TOP_K, STEP_PER_ROW, ROWS, BLOCK_E, BLOCK_ROUTE,
        )  # fmt: skip
        if tl.program_id(0) == HAS_SHARED * TILES:
            _clear(counter_ptr, counters)
            store_routing(
                probs_ptr, gates_ptr, probs, gates, rows, row_mask, E, HAS_SHARED, BLOCK_E
            )
        used, place = used_experts(tl.where(row_mask[:, None], gates, 0.0), 0)
        mine = (used != 0) & (place == slot - HAS_SHARED)
        expert = tl.sum(tl.where(mine, tl.arange(0, BLOCK_E), 0), axis=0)
        k_end = tl.where(tl.sum(mine.to(tl.int32), axis=0) > 0, D, 0)
        weight_ptr = fc1_weight_ptr + expert.to(tl.int64) * (2 * D * D)
        bias_ptr = fc1_bias_ptr + expert * (2 * D)
    mean, rstd = _row_stats(z_ptr, z_stride, rows, row_mask, eps, D, BLOCK_STAT)
    _store_hidden(
        hidden_ptr, pre_ptr, z_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, z_stride,
        mean, rstd, rows, row_mask, expert * B, tile * BLOCK_N + tl.arange(0, BLOCK_N), k_end,
        D, ROWS, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "step_value", "max_steps", "counters"])
def fc1_all_kernel(
    hidden_ptr,
    pre_ptr,
    probs_ptr,
    gates_ptr,
    counter_ptr,
    z_ptr,
    context_ptr,
    step_ptr,
    step_embed_ptr,
    router_weight_ptr,
    router_bias_ptr,
    excluded_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    shared_weight_ptr,
    shared_bias_ptr,
    z_stride,
    context_stride,
    B,
    step_value,
    max_steps,
    counters,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    ROUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROUTE: tl.constexpr,
    BLOCK_STAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Hidden states of every expert for every row; the first programs route ``ROUTE`` rows each."""
    eps = tl.cast(eps, tl.float32)
    TILES: tl.constexpr = (2 * D + BLOCK_N - 1) // BLOCK_N
    HAS_SHARED: tl.constexpr = shared_weight_ptr is not None
    pid = tl.program_id(0)
    routers = tl.cdiv(B, ROUTE)
    if pid < routers:
        if pid == 0:
            _clear(counter_ptr, counters)
        routed = pid * ROUTE + tl.arange(0, ROUTE)
        probs, gates = route_experts(
            z_ptr, context_ptr, step_ptr, step_embed_ptr, router_weight_ptr, router_bias_ptr,
            excluded_ptr, z_stride, context_stride, step_value, max_steps, routed, routed < B,
            D, E, TOP_K, STEP_PER_ROW, ROUTE, BLOCK_E, BLOCK_ROUTE,
        )  # fmt: skip
        store_routing(
            probs_ptr, gates_ptr, probs, gates, routed, routed < B, E, HAS_SHARED, BLOCK_E
        )
    else:
        # row tiles of one weight tile run side by side: it is read once, then found in L2
        row_tiles = tl.cdiv(B, ROWS)
        rows = (pid - routers) % row_tiles * ROWS + tl.arange(0, ROWS)
        tile = (pid - routers) // row_tiles % TILES
        expert = (pid - routers) // row_tiles // TILES
        row_mask = rows < B
        weight_ptr = fc1_weight_ptr + expert.to(tl.int64) * (2 * D * D)
        bias_ptr = fc1_bias_ptr + expert * (2 * D)
        if HAS_SHARED and expert == E:
            weight_ptr = shared_weight_ptr
            bias_ptr = shared_bias_ptr
        mean, rstd = _row_stats(z_ptr, z_stride, rows, row_mask, eps, D, BLOCK_STAT)
        _store_hidden(
            hidden_ptr, pre_ptr, z_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, z_stride,
            mean, rstd, rows, row_mask, expert * B, tile * BLOCK_N + tl.arange(0, BLOCK_N), D,
            D, ROWS, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B"])
def fc2_kernel(
    out_ptr,
    aux_ptr,
    partial_ptr,
    counter_ptr,
    hidden_ptr,
    probs_ptr,
    gates_ptr,
    z_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    shared_weight_ptr,
    shared_bias_ptr,
    z_stride,
    B,
    D: tl.constexpr,
    E: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """``out = z + sum_e g_e (W2_e h_e + b2_e)``; program 0 writes the auxiliary losses.

    One loop over (chosen expert, K tile), so that loads of the next expert are in flight while
    one ends; experts that no row of the tile chose are not read. ``SPLITS`` programs share the loop
    of a tile where tiles alone do not fill the device; the last one there adds their parts in
    order, so the sum does not depend on which one that is.
    """
    K: tl.constexpr = 2 * D
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    HAS_SHARED: tl.constexpr = shared_weight_ptr is not None
    WIDTH: tl.constexpr = E + HAS_SHARED
    pid = tl.program_id(0)
    if pid == 0:
        auxiliary_losses(aux_ptr, probs_ptr, B, E, BLOCK_E, PER_SAMPLE, 32)
    else:
        row_tiles = tl.cdiv(B, ROWS)
        split = (pid - 1) % SPLITS
        tile = (pid - 1) // SPLITS
        rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
        n = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < B
        n_mask = n < D
        dtype = out_ptr.dtype.element_ty
        index = tl.arange(0, BLOCK_G)
        g_mask = row_mask[:, None] & (index < WIDTH)[None, :]
        at = gates_ptr + rows[:, None] * WIDTH + index[None, :]
        gates = tl.load(at, mask=g_mask, other=0.0)
        used, place = used_experts(gates, 0)
        cols = tl.arange(0, BLOCK_K)
        if ROWS == 1:
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        else:
            acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        turns = tl.sum(used, axis=0) * K_TILES
        share = tl.cdiv(turns, SPLITS)
        end = tl.minimum(turns, (split + 1) * share)
        for i in tl.range(split * share, end, num_stages=STAGES):
            mine = (used != 0) & (place == i // K_TILES)
            expert = tl.sum(tl.where(mine, index, 0), axis=0)
            weight_ptr = fc2_weight_ptr + expert.to(tl.int64) * (D * K)
            if HAS_SHARED:
                weight_ptr = tl.where(expert == E, shared_weight_ptr, weight_ptr)
            k = i % K_TILES * BLOCK_K + cols
            k_mask = k < K
            w_mask = n_mask[:, None] & k_mask[None, :]
            w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=w_mask, other=0.0)
            h_at = (expert.to(tl.int64) * B + rows)[:, None] * K + k[None, :]
            h_mask = row_mask[:, None] & k_mask[None, :]
            h = tl.load(hidden_ptr + h_at, mask=h_mask, other=0.0).to(tl.float32)
            gate = tl.sum(tl.where(index[None, :] == expert, gates, 0.0), axis=1)[:, None]
            # chosen by another row only: whatever it holds does not count here
            h = tl.where(gate != 0.0, h * gate, 0.0)
            if ROWS == 1:
                acc += w.to(tl.float32) * h
            else:
                acc = tl.dot(h.to(dtype), tl.trans(w), acc, input_precision="ieee")
        if ROWS == 1:  # noqa: SIM108 - the types differ
            out = tl.sum(acc, axis=1)[None, :]
        else:
            out = acc
        mask = row_mask[:, None] & n_mask[None, :]
        at = rows[:, None].to(tl.int64)
        if SPLITS > 1:
            part = (tile * SPLITS).to(tl.int64) * (ROWS * BLOCK_N)
            inside = tl.arange(0, ROWS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(partial_ptr + part + split * (ROWS * BLOCK_N) + inside, out)
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
            # all masks empty but for the last
            mask = mask & (n < tl.where(arrived == SPLITS - 1, D, 0))[None, :]
            out = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for s in tl.static_range(SPLITS):
                there = partial_ptr + part + s * (ROWS * BLOCK_N) + inside
                out += tl.load(there, mask=mask, other=0.0, cache_modifier=".cg")
        for e in tl.static_range(WIDTH):
            if e == E:
                b = tl.load(shared_bias_ptr + n, mask=n_mask, other=0.0)
            else:
                b = tl.load(fc2_bias_ptr + e * D + n, mask=n_mask, other=0.0)
            gate = tl.sum(tl.where(index[None, :] == e, gates, 0.0), axis=1)[:, None]
            out += tl.where(gate != 0.0, gate * b.to(tl.float32)[None, :], 0.0)
        z = tl.load(z_ptr + at * z_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at * D + n[None, :], (z + out).to(dtype), mask=mask)


# --------------------------------------------------------------------------------- launcher


class Forward(NamedTuple):
    """What the forward leaves: output ``[B, D]``, ``[balance, entropy]``, and for the backward

    ``pre`` ``[E', B, 2D]`` (before the GELU; rows that did not choose an expert are undefined),
    ``probs`` ``[B, E]`` and ``gates`` ``[B, E']``, both float32.
    """

    out: torch.Tensor
    aux: torch.Tensor
    pre: torch.Tensor | None
    probs: torch.Tensor
    gates: torch.Tensor


def tile_config(kernel: str, rows: int, like: torch.Tensor) -> dict[str, int]:
    """Tile sizes and launch options; float32 has tables of its own, its tiles are twice as big."""
    name = f"{kernel}_float32" if like.dtype == torch.float32 else kernel
    chosen = dict(config("moe_transition", name, rows, like.device))
    return {**chosen, "num_stages": chosen["STAGES"]}


def blocks(d: int, experts: int, shared: bool, route_rows: int, rows: int) -> dict[str, int]:
    """Block sizes that follow from the shapes; 16 to 32 values per thread each."""
    block_e = triton.next_power_of_2(experts)
    full = triton.next_power_of_2(d)
    return {
        "BLOCK_E": block_e,
        "BLOCK_G": triton.next_power_of_2(experts + shared),
        "BLOCK_ROUTE": max(16, min(full, 2048 // (route_rows * block_e))),
        "BLOCK_STAT": min(full, max(64, 4096 // rows)),
    }


def row_stride(x: torch.Tensor) -> int:
    """Elements from row to row; a single row has any stride, a usable one is returned."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def forward(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: torch.Tensor | int,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None,
    per_sample: bool,
    save: bool,
) -> Forward:
    """Launch both kernels; ``weights`` must be stacked and contiguous, ``z`` contiguous in rows."""
    b, d = z.shape
    e = weights.num_experts
    shared = weights.shared
    width = e + (shared is not None)
    hidden = z.new_empty(width, b, 2 * d)
    pre = torch.empty_like(hidden) if save else None
    probs = torch.empty(b, e, dtype=torch.float32, device=z.device)
    gates = torch.empty(b, width, dtype=torch.float32, device=z.device)
    out, aux = z.new_empty(b, d), torch.empty(2, dtype=torch.float32, device=z.device)

    second = tile_config("fc2", b, z)
    column_tiles, row_tiles = triton.cdiv(d, second["BLOCK_N"]), triton.cdiv(b, second["ROWS"])
    programs = column_tiles * row_tiles * second["SPLITS"]
    counter = torch.empty(column_tiles * row_tiles, dtype=torch.int32, device=z.device)
    partial = (
        torch.empty(
            programs * second["ROWS"] * second["BLOCK_N"], dtype=torch.float32, device=z.device
        )
        if second["SPLITS"] > 1
        else None
    )

    select = b <= SELECT_MAX_ROWS
    tiles = tile_config("fc1_selected" if select else "fc1_all", b, z)
    sizes = blocks(d, e, shared is not None, tiles["ROWS"] if select else ROUTE_ROWS, tiles["ROWS"])
    group = sizes.pop("BLOCK_G")
    n_tiles = triton.cdiv(2 * d, tiles["BLOCK_N"])
    arguments = (
        hidden, pre, probs, gates, counter, z, context,
        step.contiguous() if isinstance(step, torch.Tensor) else None,
        weights.step_embed, weights.router_weight, weights.router_bias,
        excluded.contiguous().view(torch.uint8) if excluded is not None else None,
        weights.ln_weight, weights.ln_bias, weights.fc1_weight, weights.fc1_bias,
        shared.fc1_weight if shared else None, shared.fc1_bias if shared else None,
        row_stride(z), row_stride(context) if context is not None else 0,
        b, 0 if isinstance(step, torch.Tensor) else step, weights.step_embed.shape[0],
        column_tiles * row_tiles, weights.ln_eps,
    )  # fmt: skip
    constants = {
        "D": d,
        "E": e,
        "TOP_K": top_k,
        "STEP_PER_ROW": isinstance(step, torch.Tensor) and step.numel() > 1,
    }
    if select:
        slots = min(b * top_k, e) + (shared is not None)
        fc1_selected_kernel[(n_tiles * slots,)](*arguments, **constants, **sizes, **tiles)
    else:
        first = triton.cdiv(b, ROUTE_ROWS) + n_tiles * width * triton.cdiv(b, tiles["ROWS"])
        fc1_all_kernel[(first,)](
            *arguments, **constants, ROUTE=ROUTE_ROWS, **sizes, **tiles
        )

    fc2_kernel[(1 + programs,)](
        out, aux, partial, counter, hidden, probs, gates, z, weights.fc2_weight, weights.fc2_bias,
        shared.fc2_weight if shared else None, shared.fc2_bias if shared else None,
        row_stride(z), b, d, e, per_sample, BLOCK_E=sizes["BLOCK_E"], BLOCK_G=group, **second,
    )  # fmt: skip
    return Forward(out, aux, pre, probs, gates)
