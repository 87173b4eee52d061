"""One decoder-layer step on a ragged KV arena: the definition, in eager PyTorch.

    h' = h + W_o attn(RoPE(W_q n), cache ++ RoPE(W_k n), cache ++ W_v n),   n = RMSNorm(h)
    y  = h' + W_d (silu(W_g m) * W_u m),                                    m = RMSNorm(h')

It computes a layer as transformers' Qwen2-VL decoder does, rounding where it rounds. What takes
a ``linear`` takes its matrix products from there: PyTorch's own here, those of the dispatched
``ume_kernels.linear`` in the backend ``composed``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.linear import reference as plain
from ume_kernels.prefill.reference import apply_rope, rms_norm_reference, silu_mul_reference

Linear = Callable[..., torch.Tensor]
"""``(x, weight, bias or nothing)`` to ``x weightᵀ + bias``."""


def rope_table(
    positions: int, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines of positions ``0 … positions - 1``.

    Args:
        positions: number of positions P.
        inv_freq: float32 ``[dh / 2]``.

    Returns:
        float32 ``[P, dh / 2]`` each; both halves of a head use the same angles.
    """
    at = torch.arange(positions, device=inv_freq.device, dtype=torch.float32)
    angles = at[:, None] * inv_freq
    return angles.cos(), angles.sin()


def project_qkv(
    normed: torch.Tensor,
    w: DecoderLayerWeights,
    shape: LayerShape,
    linear: Linear = plain.linear,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[…, D]`` to q ``[…, H, dh]``, k and v ``[…, Hkv, dh]``, before RoPE."""
    lead = normed.shape[:-1]
    q = linear(normed, w.q_weight, w.q_bias).view(*lead, shape.num_heads, shape.head_dim)
    k = linear(normed, w.k_weight, w.k_bias).view(*lead, shape.num_kv_heads, shape.head_dim)
    v = linear(normed, w.v_weight, w.v_bias).view(*lead, shape.num_kv_heads, shape.head_dim)
    return q, k, v


def mlp(
    hidden: torch.Tensor,
    w: DecoderLayerWeights,
    shape: LayerShape,
    linear: Linear = plain.linear,
) -> torch.Tensor:
    """``hidden + W_d (silu(W_g m) * W_u m)`` with ``m = RMSNorm(hidden)``."""
    m = rms_norm_reference(hidden, w.post_norm, shape.rms_eps)
    gated = silu_mul_reference(linear(m, w.gate_weight), linear(m, w.up_weight))
    return hidden + linear(gated, w.down_weight)


@dataclass(frozen=True)
class DecodeStep:
    """What every layer of one pass shares.

    The kernels read ``lengths`` and the rotary tables; what only the PyTorch path needs is made
    on first use, once per pass.

    Attributes:
        lengths: int64 ``[B]`` on the device: tokens cached so far.
        queries: new tokens per row, Q.
        max_length: host-side bound on ``lengths + queries``, the part of the cache that is read.
        cos_table, sin_table: float32 ``[P, dh / 2]`` with P ≥ max_length, from ``rope_table``.
        shape: sizes of the layers.
        dtype: of the hidden states.
        offsets: int64 ``[B]`` on the device: a token's position less its place in its row; None
            where they are the same.
    """

    lengths: torch.Tensor
    queries: int
    max_length: int
    cos_table: torch.Tensor
    sin_table: torch.Tensor
    shape: LayerShape
    dtype: torch.dtype
    offsets: torch.Tensor | None = None

    @cached_property
    def slots(self) -> torch.Tensor:
        """Int64 ``[B, Q]``: where in its row each new token is cached."""
        return self.lengths[:, None] + torch.arange(self.queries, device=self.lengths.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Int64 ``[B, Q]``: rotary positions of the new tokens."""
        return self.slots if self.offsets is None else self.slots + self.offsets[:, None]

    @cached_property
    def rows(self) -> torch.Tensor:
        """Int64 ``[B, 1]``, 0 … B - 1."""
        return torch.arange(self.lengths.shape[0], device=self.lengths.device)[:, None]

    @cached_property
    def cos(self) -> torch.Tensor:
        """``[B, Q, 1, dh]`` in ``dtype``."""
        return _whole_heads(self.cos_table[self.positions], self.dtype)

    @cached_property
    def sin(self) -> torch.Tensor:
        """``[B, Q, 1, dh]`` in ``dtype``."""
        return _whole_heads(self.sin_table[self.positions], self.dtype)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Bool ``[B, 1, G·Q, L]``: what a query may see of its row.

        The G query heads of a KV head come first, then the Q tokens.
        """
        group = self.shape.num_heads // self.shape.num_kv_heads
        seen = torch.arange(self.max_length, device=self.lengths.device) <= self.slots[..., None]
        batch = self.lengths.shape[0]
        packed = seen[:, None].expand(batch, group, self.queries, self.max_length)
        return packed.reshape(batch, 1, group * self.queries, self.max_length)


def _whole_heads(half: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([half, half], dim=-1).to(dtype)[:, :, None]


def decode_step(
    lengths: torch.Tensor,
    queries: int,
    max_length: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    shape: LayerShape,
    dtype: torch.dtype,
    offsets: torch.Tensor | None = None,
) -> DecodeStep:
    """A pass of ``queries`` new tokens per row behind ``lengths``; see ``DecodeStep``.

    Nothing here reads a device value on the host.

    Args:
        lengths: int64 ``[B]``.
        queries, max_length, shape, dtype: as in ``DecodeStep``.
        rope: the tables of ``rope_table``; with ``offsets`` they reach the positions meant.
        offsets: as in ``DecodeStep``.

    Raises:
        ValueError: lengths or offsets are not integers ``[B]``, ``max_length`` is less than
            ``queries``, or the tables are shorter than ``max_length``, of another head size or not
            float32.
            Lengths on the CPU are also checked against ``max_length``; elsewhere reading them
            would wait for the device, and tokens outside of the arena are dropped.
    """
    cos, sin = rope
    if lengths.ndim != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"lengths must be integers [B], got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if offsets is not None and (offsets.shape != lengths.shape or offsets.dtype != torch.int64):
        raise ValueError(
            f"offsets must be int64 {tuple(lengths.shape)}, got {offsets.dtype} "
            f"{tuple(offsets.shape)}"
        )
    if not 1 <= queries <= max_length:
        raise ValueError(f"{queries} new tokens per row do not fit max_length={max_length}")
    _check_lengths(lengths, queries, max_length)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != lengths.device:
            raise ValueError(
                f"rotary {name} table must be float32 on {lengths.device}, got {table.dtype} on "
                f"{table.device}"
            )
        if table.shape[0] < max_length or table.shape[1] * 2 != shape.head_dim:
            raise ValueError(
                f"rotary {name} table is {tuple(table.shape)}; {max_length} positions of head size "
                f"{shape.head_dim} need at least ({max_length}, {shape.head_dim // 2})"
            )
    return DecodeStep(
        lengths.contiguous(), queries, max_length, cos.contiguous(), sin.contiguous(), shape, dtype,
        None if offsets is None else offsets.contiguous(),
    )  # fmt: skip


def _check_lengths(lengths: torch.Tensor, queries: int, max_length: int) -> None:
    if torch.compiler.is_compiling() or type(lengths) is not torch.Tensor or not lengths.is_cpu:
        return
    values = lengths.tolist()
    if values and (min(values) < 0 or max(values) + queries > max_length):
        raise ValueError(
            f"lengths {min(values)} … {max(values)} with {queries} new tokens are not within 0 … "
            f"max_length={max_length}"
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


def attend_cache_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Attention of a few queries per row over any rows of the arena.

    Args:
        q: ``[R, Q, H, dh]`` rotated queries.
        keys, values: ``[S, Hkv, C, dh]``; what is not visible must still be finite.
        slots: int64 ``[R]``: whose cache each row reads.
        lengths: int64 ``[R]``: tokens that the first query sees; query i sees i more.

    Returns:
        ``[R, Q, H, dh]``.
    """
    rows, queries, heads, _ = q.shape
    group = heads // keys.shape[1]
    seen = lengths[:, None] + torch.arange(queries, device=q.device)
    visible = torch.arange(keys.shape[2], device=q.device) < seen[..., None]
    packed = visible[:, None].expand(rows, group, queries, keys.shape[2])
    mask = packed.reshape(rows, 1, group * queries, keys.shape[2])
    return ragged_attention(q, keys[slots], values[slots], mask)


def decode_layer_reference(
    hidden: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: DecoderLayerWeights,
    shape: LayerShape,
    linear: Linear = plain.linear,
) -> torch.Tensor:
    """Run one layer over ``Q`` new tokens per row and append their keys and values.

    Args:
        hidden: ``[B, Q, D]``.
        step: shared tables of this pass, from ``decode_step``.
        keys, values: ``[B, Hkv, C, dh]`` this layer's cache, written in place at
            ``step.slots``; row r is slot r.
        weights, shape: the layer.
        linear: its matrix products.

    Returns:
        ``[B, Q, D]``.
    """
    batch, queries, _ = hidden.shape
    normed = rms_norm_reference(hidden, weights.input_norm, shape.rms_eps)
    q, k, v = project_qkv(normed, weights, shape, linear)
    q = apply_rope(q, step.cos, step.sin)
    keys[step.rows, :, step.slots] = apply_rope(k, step.cos, step.sin)
    values[step.rows, :, step.slots] = v
    length = step.visible.shape[-1]
    mixed = ragged_attention(q, keys[:, :, :length], values[:, :, :length], step.visible)
    hidden = hidden + linear(mixed.reshape(batch, queries, -1), weights.o_weight)
    return mlp(hidden, weights, shape, linear)
