"""A decoder layer from the Triton kernels, with cuBLAS where the tuning table prefers it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ume_kernels.decode.reference import DecodeStep
from ume_kernels.decode.triton_attention import attend
from ume_kernels.decode.triton_projections import gate_up, qkv_rope_append, residual_projection
from ume_kernels.decode.weights import DecoderLayerWeights
from ume_kernels.tuning import Config, config

ROOM = "decode"


def attend_triton(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor | None,
    lengths: torch.Tensor,
    extra: int,
) -> torch.Tensor:
    """``attend`` with the configuration of its tile; q ``[R, Q, H, dh]``."""
    tile = q.shape[2] // keys.shape[1] * q.shape[1]
    kernel = "attend_fp32" if q.dtype == torch.float32 else "attend"
    tuned = config(ROOM, kernel, tile, q.device)
    # The kernels take per-row numbers one after another; both are a few bytes.
    slots = None if slots is None else slots.contiguous()
    return attend(
        q.contiguous(), keys, values, slots, lengths.contiguous(), extra, tuned
    )


def decode_layer_triton(
    hidden: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    w: DecoderLayerWeights,
) -> torch.Tensor:
    """``decode_layer_reference`` on the kernels: five launches, more where cuBLAS is preferred."""
    batch, queries, width = hidden.shape
    shape = step.shape
    x = hidden.reshape(batch * queries, width).contiguous()

    def tuned(kernel: str) -> Config:
        return config(ROOM, kernel, x.shape[0], x.device)

    qkv = tuned("qkv")
    if qkv["gemm"] == "triton":
        rope = (step.cos_table, step.sin_table)
        q = qkv_rope_append(
            x, step.lengths, step.offsets, queries, rope, keys, values, w, shape, qkv
        )
    else:
        q = _qkv_cublas(x, step, keys, values, w)
    q = q.view(batch, queries, shape.num_heads, shape.head_dim)
    mixed = attend_triton(q, keys, values, None, step.lengths, extra=1).view(len(x), -1)

    x = _residual(x, mixed, w.o_weight, tuned("o"))
    mlp = tuned("gate_up")
    if mlp["gemm"] == "triton":
        act = gate_up(x, w, shape, mlp)
    else:
        act = _gate_up_cublas(x, w, shape.rms_eps)
    return _residual(x, act, w.down_weight, tuned("down")).view(batch, queries, width)


def _residual(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, tuned: Config
) -> torch.Tensor:
    if tuned["gemm"] == "triton":
        return residual_projection(x, y, weight, tuned)
    return torch.addmm(x, y, weight.t())


def _qkv_cublas(
    x: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    w: DecoderLayerWeights,
) -> torch.Tensor:
    from ume_kernels.prefill import rms_norm, rope_append

    shape = step.shape
    normed = rms_norm(x, w.input_norm, shape.rms_eps)
    q, k, v = (
        F.linear(normed, weight, bias).view(len(x), -1, shape.head_dim)
        for weight, bias in (
            (w.q_weight, w.q_bias), (w.k_weight, w.k_bias), (w.v_weight, w.v_bias)
        )
    )  # fmt: skip
    positions = step.slots.flatten()
    slots = step.rows.expand(-1, step.queries).flatten()
    cos, sin = step.cos.flatten(0, 2), step.sin.flatten(0, 2)
    return rope_append(q, k, v, cos, sin, keys, values, slots, positions)


def _gate_up_cublas(x: torch.Tensor, w: DecoderLayerWeights, eps: float) -> torch.Tensor:
    from ume_kernels.prefill import rms_norm, silu_mul

    m = rms_norm(x, w.post_norm, eps)
    return silu_mul(F.linear(m, w.gate_weight), F.linear(m, w.up_weight))
