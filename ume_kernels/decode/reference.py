"""One decoder-layer step on a ragged KV arena: the definition, in eager PyTorch.

    h' = h + W_o attn(RoPE(W_q n), cache ++ RoPE(W_k n), cache ++ W_v n),   n = RMSNorm(h)
    y  = h' + W_d (silu(W_g m) * W_u m),                                    m = RMSNorm(h')

The parts (``rms_norm``, ``project_qkv``, ``apply_rope``, ``mlp``) are those of the prefill as
well: both compute a layer as transformers' Qwen2-VL decoder does, rounding where it rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.linear import linear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last axis, statistics in float32.

    The normalised value is rounded to the type of ``x`` before the weight, as in transformers.
    """
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)


def rope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables ``[…, dh]`` in ``dtype`` for integer positions ``[…]``; angles in float32."""
    angles = positions[..., None].float() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves: ``x * cos + cat(-x2, x1) * sin``; ``cos``/``sin`` broadcast over heads."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def project_qkv(
    normed: torch.Tensor, w: DecoderLayerWeights, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[…, D]`` to q ``[…, H, dh]``, k and v ``[…, Hkv, dh]``, before RoPE."""
    lead = normed.shape[:-1]
    q = linear(normed, w.q_weight, w.q_bias).view(*lead, shape.num_heads, shape.head_dim)
    k = linear(normed, w.k_weight, w.k_bias).view(*lead, shape.num_kv_heads, shape.head_dim)
    v = linear(normed, w.v_weight, w.v_bias).view(*lead, shape.num_kv_heads, shape.head_dim)
    return q, k, v


def mlp(hidden: torch.Tensor, w: DecoderLayerWeights, shape: LayerShape) -> torch.Tensor:
    """``hidden + W_d (silu(W_g m) * W_u m)`` with ``m = RMSNorm(hidden)``."""
    m = rms_norm(hidden, w.post_norm, shape.rms_eps)
    gated = F.silu(linear(m, w.gate_weight)) * linear(m, w.up_weight)
    return hidden + linear(gated, w.down_weight)


@dataclass(frozen=True)
class DecodeStep:
    """What every layer of one pass shares, computed once per pass.

    Attributes:
        cos, sin: ``[B, Q, 1, dh]`` rotary tables of the new tokens.
        rows: int64 ``[B, 1]``, 0 … B - 1.
        slots: int64 ``[B, Q]``: where in its row each new token is cached.
        visible: bool ``[B, 1, G·Q, L]``: what a query may see of its row; the G query heads of
            a KV head come first, then the Q tokens.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor


def decode_step(
    lengths: torch.Tensor,
    queries: int,
    max_length: int,
    shape: LayerShape,
    inv_freq: torch.Tensor,
    dtype: torch.dtype,
) -> DecodeStep:
    """Tables for ``queries`` new tokens per row at positions ``lengths …`` (int64 ``[B]``).

    ``max_length`` is a host-side bound on ``lengths + queries``, the part of the cache that is
    read; nothing here reads a device value on the host.
    """
    device, batch = lengths.device, lengths.shape[0]
    slots = lengths[:, None] + torch.arange(queries, device=device)
    cos, sin = rope_cos_sin(slots, inv_freq, dtype)
    seen = torch.arange(max_length, device=device) <= slots[..., None]
    group = shape.num_heads // shape.num_kv_heads
    visible = seen[:, None].expand(batch, group, queries, max_length)
    return DecodeStep(
        cos[:, :, None],
        sin[:, :, None],
        torch.arange(batch, device=device)[:, None],
        slots,
        visible.reshape(batch, 1, group * queries, max_length),
    )


def ragged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Attention of the new tokens of every row over the row's own cache.

    Query heads that share a KV head are packed along the query axis, so the cache is read
    once and never repeated.

    Args:
        q: ``[B, Q, H, dh]`` rotated queries.
        keys, values: ``[B, Hkv, L, dh]``; what is not visible must still be finite.
        visible: as in ``DecodeStep``.

    Returns:
        ``[B, Q, H, dh]``.
    """
    batch, queries, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    packed = q.view(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        packed.reshape(batch, kv_heads, group * queries, dim), keys, values, attn_mask=visible
    )
    out = out.view(batch, kv_heads, group, queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, dim)


def decode_layer_reference(
    hidden: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: DecoderLayerWeights,
    shape: LayerShape,
) -> torch.Tensor:
    """Run one layer over ``Q`` new tokens per row and append their keys and values.

    Args:
        hidden: ``[B, Q, D]``.
        step: shared tables of this pass, from ``decode_step``.
        keys, values: ``[B, Hkv, C, dh]`` this layer's cache, written in place at
            ``step.slots``.
        weights, shape: the layer.

    Returns:
        ``[B, Q, D]``.
    """
    batch, queries, _ = hidden.shape
    normed = rms_norm(hidden, weights.input_norm, shape.rms_eps)
    q, k, v = project_qkv(normed, weights, shape)
    q = apply_rope(q, step.cos, step.sin)
    keys[step.rows, :, step.slots] = apply_rope(k, step.cos, step.sin)
    values[step.rows, :, step.slots] = v
    length = step.visible.shape[-1]
    mixed = ragged_attention(q, keys[:, :, :length], values[:, :, :length], step.visible)
    hidden = hidden + linear(mixed.reshape(batch, queries, -1), weights.o_weight)
    return mlp(hidden, weights, shape)
