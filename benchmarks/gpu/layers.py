"""Decoder layers of published shapes with random weights, and an arena to run them on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ume_kernels import DecoderLayerWeights, LayerShape, decode_step
from ume_kernels.decode import DecodeStep
from ume_kernels.decode.reference import rope_table


@dataclass(frozen=True)
class LayerSize:
    """Width, feed-forward width and heads of a layer."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def shape(self) -> LayerShape:
        """As the kernels take it."""
        return LayerShape(self.heads, self.kv_heads, self.head_dim, 1e-6)


SIZES = {
    "qwen2-vl-2b": LayerSize(1536, 8960, 12, 2, 128),
    "qwen2.5-vl-3b": LayerSize(2048, 11008, 16, 2, 128),
    "qwen2-vl-7b": LayerSize(3584, 18944, 28, 4, 128),
    "small": LayerSize(768, 2048, 6, 2, 128),
    "tiny": LayerSize(64, 96, 4, 2, 16),
}


def random_layer(
    size: LayerSize, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> DecoderLayerWeights:
    """Weights of a scale that keeps every part of the layer in play."""
    generator = torch.Generator(device).manual_seed(seed)
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim

    def draw(*shape: int, mean: float = 0.0, scale: float = 0.3) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale + mean
        return values.to(dtype)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return draw(rows, columns, scale=columns**-0.5)

    return DecoderLayerWeights(
        input_norm=draw(size.width, mean=1.0),
        q_weight=matrix(q, size.width),
        q_bias=draw(q),
        k_weight=matrix(kv, size.width),
        k_bias=draw(kv),
        v_weight=matrix(kv, size.width),
        v_bias=draw(kv),
        o_weight=matrix(size.width, q),
        post_norm=draw(size.width, mean=1.0),
        gate_weight=matrix(size.inner, size.width),
        up_weight=matrix(size.inner, size.width),
        down_weight=matrix(size.width, size.inner),
    )


def converted(weights: DecoderLayerWeights, dtype: torch.dtype) -> DecoderLayerWeights:
    """The same values in another type."""
    values = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return DecoderLayerWeights(**{k: None if v is None else v.to(dtype) for k, v in values.items()})


def layer_bytes(weights: DecoderLayerWeights) -> int:
    """Bytes of all parameters."""
    values = [getattr(weights, f.name) for f in fields(weights)]
    return sum(v.nbytes for v in values if v is not None)


def rope_of(size: LayerSize, positions: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rotary tables of ``positions`` positions, theta 1e6."""
    exponent = torch.arange(0, size.head_dim, 2, device=device).float() / size.head_dim
    return rope_table(positions, 1.0 / (1e6**exponent))


def step_of(
    size: LayerSize, lengths: torch.Tensor, queries: int, capacity: int, dtype: torch.dtype
) -> DecodeStep:
    """A pass of ``queries`` new tokens per row."""
    cos, sin = rope_of(size, capacity, lengths.device)
    return decode_step(lengths, queries, capacity, (cos, sin), size.shape, dtype)
