"""Parameters and shape of one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a grouped-query decoder layer.

    Attributes:
        num_heads: query heads, H.
        num_kv_heads: key/value heads, a divisor of H.
        head_dim: width of a head.
        rms_eps: epsilon of both RMSNorms.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float


@dataclass(frozen=True)
class DecoderLayerWeights:
    """Qwen2 decoder layer: RMSNorm, biased QKV, RoPE, GQA attention, SwiGLU.

    Shapes: norms [D]; ``q_weight`` [H·dh, D]; ``k_weight``/``v_weight`` [Hkv·dh, D]; biases to
    match, or None; ``o_weight`` [D, H·dh]; ``gate_weight``/``up_weight`` [I, D];
    ``down_weight`` [D, I].
    """

    input_norm: torch.Tensor
    q_weight: torch.Tensor
    q_bias: torch.Tensor | None
    k_weight: torch.Tensor
    k_bias: torch.Tensor | None
    v_weight: torch.Tensor
    v_bias: torch.Tensor | None
    o_weight: torch.Tensor
    post_norm: torch.Tensor
    gate_weight: torch.Tensor
    up_weight: torch.Tensor
    down_weight: torch.Tensor
