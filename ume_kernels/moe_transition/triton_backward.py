"""Triton kernels of the latent transition, backward, and their launcher.

Three launches: back through every expert's second layer and GELU, through the first layers, and per
row through router, auxiliary losses and LayerNorm. Products that are plain dense GEMMs (the weight
gradients) are left to cuBLAS. Nothing is summed atomically: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.moe_transition.gradients import Backward
from ume_kernels.moe_transition.triton_kernels import (
    blocks,
    gelu,
    row_stride,
    tile_config,
)
from ume_kernels.moe_transition.triton_routing import used_experts
from ume_kernels.moe_transition.weights import MoEWeights

GRAD_HIDDEN_BUDGET = Budget(registers=128, shared=50_000, blocks_per_sm=2)
GRAD_NORM_BUDGET = Budget(registers=96, shared=50_000, blocks_per_sm=4)
GRAD_INPUT_BUDGET = Budget(registers=96, shared=1_024, blocks_per_sm=5)


@triton.jit
def gelu_slope(x):  # noqa: ANN201
    """Derivative of the erf GELU."""
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)



@triton.jit(do_not_specialize=["B"])
def grad_hidden_kernel(
    grad_pre_ptr,
    gated_ptr,
    grad_gates_ptr,
    grad_ptr,
    pre_ptr,
    gates_ptr,
    fc2_weight_ptr,
    shared_weight_ptr,
    B,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Back through the second layer and the GELU of every expert.

    ``G_e = dout W2_e``; ``da_e = g_e G_e gelu'(a_e)``; ``gated_e = g_e gelu(a_e)`` for the weight
    gradients; ``dg_e = sum G_e gelu(a_e)`` per tile of 2D, ``[tiles, B, E']``, summed in order by
    ``grad_input_kernel``. Rows that did not choose an expert get exact zeros.
    """
    N: tl.constexpr = 2 * D
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HAS_SHARED: tl.constexpr = shared_weight_ptr is not None
    WIDTH: tl.constexpr = E + HAS_SHARED
    dtype = grad_pre_ptr.dtype.element_ty
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(B, ROWS)
    rows = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    tile = pid // row_tiles % TILES
    expert = pid // row_tiles // TILES
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < B
    n_mask = n < N
    weight_ptr = fc2_weight_ptr + expert.to(tl.int64) * (D * N)
    if HAS_SHARED and expert == E:
        weight_ptr = shared_weight_ptr
    gate = tl.load(gates_ptr + rows * WIDTH + expert, mask=row_mask, other=0.0)
    chosen = tl.max((gate != 0.0).to(tl.int32), axis=0)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    cols = tl.arange(0, BLOCK_K)
    for start in tl.range(0, chosen * D, BLOCK_K, num_stages=STAGES):
        k = start + cols
        k_mask = k < D
        g_at = grad_ptr + rows[:, None].to(tl.int64) * D + k[None, :]
        g = tl.load(g_at, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w_at = weight_ptr + k[:, None] * N + n[None, :]
        w = tl.load(w_at, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision="ieee")
    at = (expert.to(tl.int64) * B + rows)[:, None] * N + n[None, :]
    mask = row_mask[:, None] & n_mask[None, :]
    live = gate[:, None] != 0.0
    pre = tl.load(pre_ptr + at, mask=mask & live, other=0.0).to(tl.float32)
    hidden = gelu(pre)
    grad_pre = tl.where(live, gate[:, None] * acc * gelu_slope(pre), 0.0)
    tl.store(grad_pre_ptr + at, grad_pre.to(dtype), mask=mask)
    tl.store(gated_ptr + at, tl.where(live, gate[:, None] * hidden, 0.0).to(dtype), mask=mask)
    part = tl.sum(tl.where(live & n_mask[None, :], acc * hidden, 0.0), axis=1)
    tl.store(grad_gates_ptr + (tile * B + rows) * WIDTH + expert, part, mask=row_mask)


@triton.jit(do_not_specialize=["B"])
def grad_norm_kernel(
    grad_norm_ptr,
    grad_pre_ptr,
    gates_ptr,
    fc1_weight_ptr,
    shared_weight_ptr,
    B,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """``du = sum_e da_e W1_e`` ``[B, D]`` float32, the gradient of the LayerNorm's output."""
    K: tl.constexpr = 2 * D
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    HAS_SHARED: tl.constexpr = shared_weight_ptr is not None
    WIDTH: tl.constexpr = E + HAS_SHARED
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(B, ROWS)
    rows = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    n = pid // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < B
    n_mask = n < D
    index = tl.arange(0, BLOCK_G)
    g_mask = row_mask[:, None] & (index < WIDTH)[None, :]
    at = gates_ptr + rows[:, None] * WIDTH + index[None, :]
    used, place = used_experts(tl.load(at, mask=g_mask, other=0.0), 0)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    cols = tl.arange(0, BLOCK_K)
    for i in tl.range(0, tl.sum(used, axis=0) * K_TILES, num_stages=STAGES):
        mine = (used != 0) & (place == i // K_TILES)
        expert = tl.sum(tl.where(mine, index, 0), axis=0)
        weight_ptr = fc1_weight_ptr + expert.to(tl.int64) * (K * D)
        if HAS_SHARED:
            weight_ptr = tl.where(expert == E, shared_weight_ptr, weight_ptr)
        k = i % K_TILES * BLOCK_K + cols
        k_mask = k < K
        w_at = weight_ptr + k[:, None] * D + n[None, :]
        w = tl.load(w_at, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        d_at = (expert.to(tl.int64) * B + rows)[:, None] * K + k[None, :]
        d_mask = row_mask[:, None] & k_mask[None, :]
        d = tl.load(grad_pre_ptr + d_at, mask=d_mask, other=0.0)
        acc = tl.dot(d, w, acc, input_precision="ieee")
    at = grad_norm_ptr + rows[:, None].to(tl.int64) * D + n[None, :]
    tl.store(at, acc, mask=row_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["B", "tiles"])
def grad_input_kernel(
    grad_z_ptr,
    grad_router_ptr,
    grad_logits_ptr,
    grad_ptr,
    grad_aux_ptr,
    grad_norm_ptr,
    grad_gates_ptr,
    probs_ptr,
    mean_probs_ptr,
    gates_ptr,
    z_ptr,
    ln_weight_ptr,
    router_weight_ptr,
    fc2_bias_ptr,
    z_stride,
    B,
    tiles,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """One row: router, residual and LayerNorm.

    ``dp`` is the gradient of the chosen gates, and of balance loss and entropy through all;
    ``dlogits = p (dp - sum p dp)``; ``dx = dlogits W_r[:, :D]`` (of z + context);
    ``dz = dout + dx + LayerNorm'(du)``.
    """
    eps = tl.cast(eps, tl.float32)
    WIDTH: tl.constexpr = E + HAS_SHARED
    row = tl.program_id(0)
    long = row.to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    real = experts < E
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    grad = tl.load(grad_ptr + long * D + d, mask=d_mask, other=0.0).to(tl.float32)

    dp = tl.zeros([BLOCK_E], tl.float32)
    for tile in range(tiles):
        at = grad_gates_ptr + (tile * B + row) * WIDTH + experts
        dp += tl.load(at, mask=real, other=0.0)
    for e in tl.static_range(E):
        b = tl.load(fc2_bias_ptr + e * D + d, mask=d_mask, other=0.0).to(tl.float32)
        dp += tl.where(experts == e, tl.sum(grad * b, axis=0), 0.0)
    gate = tl.load(gates_ptr + row * WIDTH + experts, mask=real, other=0.0)
    dp = tl.where(gate != 0.0, dp, 0.0)

    p = tl.load(probs_ptr + row * E + experts, mask=real, other=0.0)
    if PER_SAMPLE:  # noqa: SIM108 - the load must not be compiled
        balanced = p
    else:
        balanced = tl.load(mean_probs_ptr + experts, mask=real, other=0.0)
    scale = 1.0 / (B * 1.0)
    grad_balance = tl.load(grad_aux_ptr).to(tl.float32)
    grad_entropy = tl.load(grad_aux_ptr + 1).to(tl.float32)
    dp += grad_balance * scale * (2.0 / E) * (balanced - 1.0 / E)
    slope = tl.log(tl.maximum(p, 1e-8)) + tl.where(p >= 1e-8, 1.0, 0.0)
    dp -= grad_entropy * scale * slope
    dp = tl.where(real, dp, 0.0)
    dlogits = p * (dp - tl.sum(p * dp, axis=0))
    tl.store(grad_logits_ptr + row * E + experts, dlogits, mask=real)

    dx = tl.zeros([BLOCK_D], tl.float32)
    for e in tl.static_range(E):
        w = tl.load(router_weight_ptr + e * (2 * D) + d, mask=d_mask, other=0.0).to(tl.float32)
        dx += tl.sum(tl.where(experts == e, dlogits, 0.0), axis=0) * w
    if grad_router_ptr is not None:
        dtype = grad_router_ptr.dtype.element_ty
        tl.store(grad_router_ptr + long * D + d, dx.to(dtype), mask=d_mask)

    z = tl.load(z_ptr + long * z_stride + d, mask=d_mask, other=0.0).to(tl.float32)
    off = tl.where(d_mask, z - tl.sum(z, axis=0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(off * off, axis=0) / D + eps)
    normal = off * rstd
    weight = tl.load(ln_weight_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
    du = tl.load(grad_norm_ptr + long * D + d, mask=d_mask, other=0.0) * weight
    mean_du = tl.sum(du, axis=0) / D
    mean_normal = tl.sum(du * normal, axis=0) / D
    dz = grad + dx + rstd * (du - mean_du - normal * mean_normal)
    tl.store(grad_z_ptr + long * D + d, dz.to(grad_z_ptr.dtype.element_ty), mask=d_mask)


# --------------------------------------------------------------------------------- launcher


def backward(
    grad: torch.Tensor,
    grad_aux: torch.Tensor,
    z: torch.Tensor,
    has_context: bool,
    pre: torch.Tensor,
    probs: torch.Tensor,
    gates: torch.Tensor,
    weights: MoEWeights,
    per_sample: bool,
) -> Backward:
    """Launch the three kernels; ``weights`` stacked and contiguous, ``grad`` contiguous."""
    b, d = z.shape
    e = weights.num_experts
    shared = weights.shared
    width = e + (shared is not None)
    grad_pre, gated = torch.empty_like(pre), torch.empty_like(pre)

    tiles = tile_config("grad_hidden", b, z)
    n_tiles = triton.cdiv(2 * d, tiles["BLOCK_N"])
    grad_gates = torch.empty(n_tiles, b, width, dtype=torch.float32, device=z.device)
    grad_hidden_kernel[(n_tiles * width * triton.cdiv(b, tiles["ROWS"]),)](
        grad_pre, gated, grad_gates, grad, pre, gates, weights.fc2_weight,
        shared.fc2_weight if shared else None, b, d, e, **tiles,
    )  # fmt: skip

    tiles = tile_config("grad_norm", b, z)
    sizes = blocks(d, e, shared is not None, 1, tiles["ROWS"])
    grad_norm = torch.empty(b, d, dtype=torch.float32, device=z.device)
    grad_norm_kernel[(triton.cdiv(d, tiles["BLOCK_N"]) * triton.cdiv(b, tiles["ROWS"]),)](
        grad_norm, grad_pre, gates, weights.fc1_weight, shared.fc1_weight if shared else None,
        b, d, e, BLOCK_G=sizes["BLOCK_G"], **tiles,
    )  # fmt: skip

    grad_z, grad_logits = z.new_empty(b, d), torch.empty_like(probs)
    grad_context = z.new_empty(b, d) if has_context else None
    grad_input_kernel[(b,)](
        grad_z, grad_context, grad_logits, grad, grad_aux, grad_norm, grad_gates, probs,
        probs.mean(0), gates, z, weights.ln_weight, weights.router_weight, weights.fc2_bias,
        row_stride(z), b, n_tiles, weights.ln_eps, d, e, shared is not None, per_sample,
        BLOCK_D=triton.next_power_of_2(d), BLOCK_E=sizes["BLOCK_E"],
        num_warps=4 if d <= 2048 else 8,
    )  # fmt: skip
    return Backward(grad_z, grad_context, grad_pre, gated, grad_norm, grad_logits)
