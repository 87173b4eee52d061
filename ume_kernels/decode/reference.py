"""One decoder-layer step on a ragged KV arena: the definition, in eager PyTorch.

    h' = h + W_o attn(RoPE(W_q n), cache ++ RoPE(W_k n), cache ++ W_v n),   n = RMSNorm(h)
    y  = h' + W_d (silu(W_g m) * W_u m),                                    m = RMSNorm(h')

The parts (``rms_norm``, ``project_qkv``, ``apply_rope``, ``mlp``) are those of the prefill as
well: both compute a layer as transformers' Qwen2-VL decoder does, rounding where it rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.linear import linear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last axis, statistics in float32."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


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


def ragged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the last ``Q`` tokens of every row over its own cache.

    Query heads that share a KV head are packed along the query axis, so the cache is read
    once and never repeated.

    Args:
        q: ``[B, Q, H, dh]`` rotated queries of tokens at ``lengths … lengths + Q - 1``.
        keys, values: ``[B, Hkv, L, dh]``; everything from ``lengths + Q`` on is masked but must
            be finite.
        lengths: ``[B]`` tokens cached before these.

    Returns:
        ``[B, Q, H, dh]``.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    offsets = torch.arange(queries, device=q.device)
    last = lengths[:, None] + offsets
    visible = torch.arange(capacity, device=q.device) <= last[..., None]
    packed = q.view(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    mask = visible[:, None, None].expand(batch, 1, group, queries, capacity)
    out = F.scaled_dot_product_attention(
        packed.reshape(batch, kv_heads, group * queries, dim),
        keys,
        values,
        attn_mask=mask.reshape(batch, 1, group * queries, capacity),
    )
    out = out.view(batch, kv_heads, group, queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, dim)


def decode_layer_reference(
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    weights: DecoderLayerWeights,
    shape: LayerShape,
    max_length: int,
) -> torch.Tensor:
    """Run one layer over ``Q`` new tokens per row and append their keys and values.

    Args:
        hidden: ``[B, Q, D]``.
        cos, sin: ``[B, Q, dh]`` rotary tables of the new tokens' positions.
        keys, values: ``[B, Hkv, C, dh]`` this layer's cache, written in place at
            ``lengths … lengths + Q - 1`` of every row.
        lengths: int64 ``[B]`` on the device; not changed.
        weights, shape: the layer.
        max_length: host-side bound on ``lengths + Q`` (the part of the cache that is read).

    Returns:
        ``[B, Q, D]``.
    """
    batch, queries, _ = hidden.shape
    normed = rms_norm(hidden, weights.input_norm, shape.rms_eps)
    q, k, v = project_qkv(normed, weights, shape)
    q = apply_rope(q, cos[:, :, None], sin[:, :, None])
    k = apply_rope(k, cos[:, :, None], sin[:, :, None])
    rows = torch.arange(batch, device=hidden.device)[:, None]
    slots = lengths[:, None] + torch.arange(queries, device=hidden.device)
    keys[rows, :, slots] = k
    values[rows, :, slots] = v
    mixed = ragged_attention(q, keys[:, :, :max_length], values[:, :, :max_length], lengths)
    hidden = hidden + linear(mixed.reshape(batch, queries, -1), weights.o_weight)
    return mlp(hidden, weights, shape)
