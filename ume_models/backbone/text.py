"""Qwen2 text decoder: parameters under their published names, packed prefill, cached decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ume_kernels.decode import (
    DecoderLayerWeights,
    LayerShape,
    decode_layer,
    decode_step,
    rope_table,
)
from ume_kernels.decode.reference import project_qkv
from ume_kernels.linear import linear
from ume_kernels.prefill import rms_norm, silu_mul_
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.mrope import mrope_cos_sin
from ume_models.backbone.packed_attention import Span, choose_attention

__all__ = ["RopeTable", "Span", "TextModel"]

RopeTable = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines ``[P, dh / 2]`` of positions 0 … P - 1, float32."""


class RMSNorm(nn.Module):
    """Holds a norm weight; applied by ``ume_kernels.prefill.rms_norm``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    """Projections of grouped-query attention; q, k and v have biases."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * dim)
        self.k_proj = nn.Linear(width, config.num_kv_heads * dim)
        self.v_proj = nn.Linear(width, config.num_kv_heads * dim)
        self.o_proj = nn.Linear(config.num_heads * dim, width, bias=False)


class MLP(nn.Module):
    """Projections of the SwiGLU."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class DecoderLayer(nn.Module):
    """Parameters of one layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def weights(self) -> DecoderLayerWeights:
        """The parameters as the kernels take them; no copy."""
        a, m = self.self_attn, self.mlp
        return DecoderLayerWeights(
            self.input_layernorm.weight,
            a.q_proj.weight,
            a.q_proj.bias,
            a.k_proj.weight,
            a.k_proj.bias,
            a.v_proj.weight,
            a.v_proj.bias,
            a.o_proj.weight,
            self.post_attention_layernorm.weight,
            m.gate_proj.weight,
            m.up_proj.weight,
            m.down_proj.weight,
        )


class TextModel(nn.Module):
    """Embedding, decoder layers and final norm.

    The KV cache is a tensor ``[layers, 2, slots, Hkv, capacity, dh]`` owned by the caller.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size)
        self.shape = LayerShape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.rms_eps
        )

    def layer_weights(self) -> list[DecoderLayerWeights]:
        """Every layer's parameters as the kernels take them."""
        return [layer.weights() for layer in self.layers if isinstance(layer, DecoderLayer)]

    def inv_freq(self) -> torch.Tensor:
        """RoPE frequencies ``[dh / 2]`` in float32: ``theta^(-2i/dh)``."""
        dim = self.config.head_dim
        device = self.norm.weight.device
        exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
        return 1.0 / (self.config.rope_theta**exponent)

    def rope_table(self, positions: int) -> RopeTable:
        """Rotary tables of the decode for positions below ``positions``, each axis alike."""
        return rope_table(positions, self.inv_freq())

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """RMSNorm after the last layer."""
        return rms_norm(hidden, self.norm.weight, self.shape.rms_eps)

    def prefill(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        spans: Sequence[Span],
        cache: torch.Tensor,
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Run packed prompts, fill the cache, return the hidden states that are read.

        The last layer computes keys and values for all tokens but everything else only for
        ``wanted``, since nothing after it reads the other tokens.

        Args:
            embeds: ``[T, D]`` packed inputs of all rows.
            positions: int64 ``[3, T]`` M-RoPE positions.
            spans: where each row lies in the pack and in the cache.
            cache: ``[layers, 2, slots, Hkv, capacity, dh]``, written in place.
            wanted: packed indices of the R tokens to return, ascending.

        Returns:
            ``[R, D]`` hidden states after the final norm.
        """
        cos, sin = mrope_cos_sin(
            positions, self.inv_freq(), self.config.mrope_section, embeds.dtype
        )
        attention = choose_attention(spans, wanted, cos, sin)
        hidden = embeds
        last = len(self.layers) - 1
        gate, up = embeds.new_empty(2, embeds.shape[0], self.config.intermediate_size).unbind(0)
        for number, w in enumerate(self.layer_weights()):
            normed = rms_norm(hidden, w.input_norm, self.shape.rms_eps)
            q, k, v = project_qkv(normed, w, self.shape, linear)
            mixed = attention(q, k, v, cache[number, 0], cache[number, 1], number == last)
            if number == last:
                hidden = hidden[attention.wanted]
            hidden = hidden + linear(mixed.flatten(1), w.o_weight)
            hidden = _mlp(hidden, w, self.shape, gate[: len(hidden)], up[: len(hidden)])
        return self.final_norm(hidden)

    def decode(
        self,
        embeds: torch.Tensor,
        lengths: torch.Tensor,
        cache: torch.Tensor,
        max_length: int,
        layers: Sequence[DecoderLayerWeights],
        rope: RopeTable,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run ``Q`` new tokens per row, behind its KV length.

        Args:
            embeds: ``[B, Q, D]``.
            lengths: int64 ``[B]`` on the device: tokens cached so far; not changed.
            cache: rows are slots ``0 … B - 1``; written in place.
            max_length: host-side bound on ``lengths + Q``.
            layers, rope: ``layer_weights()`` and ``rope_table(P)`` with P beyond every position,
                fetched once per rollout.
            offsets: int64 ``[B]`` on the device: a token's position less its place in the row,
                which is also its position where there is None.

        Returns:
            ``[B, Q, D]`` after the final norm.
        """
        batch, queries, _ = embeds.shape
        step = decode_step(lengths, queries, max_length, rope, self.shape, embeds.dtype, offsets)
        hidden = embeds
        for number, w in enumerate(layers):
            keys, values = cache[number, 0, :batch], cache[number, 1, :batch]
            hidden = decode_layer(hidden, step, keys, values, w, self.shape)
        return self.final_norm(hidden)


def _mlp(
    hidden: torch.Tensor,
    w: DecoderLayerWeights,
    shape: LayerShape,
    gate: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    """``ume_kernels.decode.reference.mlp`` for many tokens, without allocating its width.

    The two ``[T, I]`` intermediates are by far the largest of a layer; fresh memory for each of
    them costs more, page by page, than the arithmetic on them.
    """
    m = rms_norm(hidden, w.post_norm, shape.rms_eps)
    torch.mm(m, w.gate_weight.t(), out=gate)
    torch.mm(m, w.up_weight.t(), out=up)
    silu_mul_(gate, up)
    return hidden + torch.mm(gate, w.down_weight.t())
