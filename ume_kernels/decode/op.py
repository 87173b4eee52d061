"""Argument checks and choice of implementation for the decode step."""

from __future__ import annotations

import torch

from ume_kernels.decode.reference import DecodeStep, decode_layer_reference
from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.dispatch import Backend, select

MAX_NEW_TOKENS = 64


def decode_layer(
    hidden: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: DecoderLayerWeights,
    shape: LayerShape,
    *,
    backend: str | Backend | None = None,
) -> torch.Tensor:
    """One decoder layer over a few new tokens per row on a ragged KV arena.

    See ``decode_layer_reference`` for the formula, the arguments and the result. Keys and
    values are appended in place.

    Raises:
        ValueError: a shape does not fit, or the new tokens would not fit the arena.
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [B, Q, D], got {tuple(hidden.shape)}")
    batch, queries, _ = hidden.shape
    if not 1 <= queries <= MAX_NEW_TOKENS:
        raise ValueError(f"decode takes 1 … {MAX_NEW_TOKENS} new tokens per row, got {queries}")
    if step.slots.shape != (batch, queries):
        raise ValueError(
            f"step is for {tuple(step.slots.shape)} tokens, hidden has {(batch, queries)}"
        )
    expected = (batch, shape.num_kv_heads, keys.shape[2], shape.head_dim)
    for name, cache in (("keys", keys), ("values", values)):
        if tuple(cache.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {tuple(cache.shape)}")
    if step.visible.shape[-1] > keys.shape[2]:
        raise ValueError(
            f"{step.visible.shape[-1]} tokens do not fit an arena of capacity {keys.shape[2]}"
        )
    select("decode", hidden, backend=backend)
    return decode_layer_reference(hidden, step, keys, values, weights, shape)
