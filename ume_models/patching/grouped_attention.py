"""Attention for transformers' registries: grouped queries without repeated keys and values.

Query heads that share a key/value head attend to it together. A single new token without padding
goes to the decode kernel where there is one; everything else is one
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ume_kernels import attend_cache, dispatch
from ume_kernels.dispatch import Backend
from ume_models.patching.forwards import undisturbed

Tensor = torch.Tensor

UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache", "head_mask")
"""Arguments of other models' attention that change the numbers or the memory layout."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``softmax(scaling · q kᵀ + mask) v``, as transformers' ``sdpa`` gives it.

    Args:
        module: the attention module; its ``is_causal`` counts where the argument is None.
        query: ``[B, H, Q, dh]`` rotated.
        key: ``[B, Hkv, L, dh]`` rotated, Hkv a divisor of H.
        value: ``[B, Hkv, L, dv]``.
        attention_mask: ``[B or 1, H or 1, Q, ≥ L]``, bool (True attends) or added to the scores;
            None: causal where the module is and Q > 1, else everything.
        dropout: probability.
        scaling: ``1 / √dh`` if None.
        is_causal: only looked at where there is no mask.
        others: what transformers passes to every attention.

    Returns:
        ``([B, Q, H, dv], None)``; the weights are never made.

    Raises:
        ValueError: the model needs something that this attention has not.
    """
    if others.get("output_attentions") or any(others.get(n) is not None for n in UNSUPPORTED):
        wanted = [n for n in (*UNSUPPORTED, "output_attentions") if others.get(n) is not None]
        raise ValueError(
            f'attn_implementation="ume" has no {wanted[0]}; load the model with '
            'attn_implementation="eager"'
        )
    queries, length = query.shape[2], key.shape[2]
    if attention_mask is not None:
        if attention_mask.ndim != 4:
            raise ValueError(
                f"the attention mask is {tuple(attention_mask.shape)}, expected [B, H or 1, Q, L]; "
                'load the model with attn_implementation="sdpa"'
            )
        attention_mask = attention_mask[..., :length]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and queries > 1
    if causal and length > queries:
        # A preallocated cache behind an empty one: the first keys are those of the queries.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if _kernel_takes(query, key, value, attention_mask, dropout, scaling):
        rows = _rows(len(query), length, query.device)
        return attend_cache(query.transpose(1, 2), key, value, *rows), None
    mixed = _grouped(query, key, value, attention_mask, causal, dropout, scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _kernel_takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> bool:
    """Whether the decode kernel computes this: one token per row, which sees all of its cache."""
    dim = query.shape[3]
    if (
        query.shape[2] != 1
        or mask is not None
        or dropout
        or len(query) == 0
        or key.shape != value.shape
        or (scaling is not None and scaling != dim**-0.5)
        or not undisturbed()
        or _capturing()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
        or torch.is_autocast_enabled(query.device.type)
    ):
        return False
    backend = dispatch.select("decode", query.transpose(1, 2), key, value)
    return backend is Backend.TRITON


def _capturing() -> bool:
    """Whether a CUDA graph is recorded: numbers kept from call to call would not survive that."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _rows(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots and lengths ``[B]`` of rows that all see the same number of keys."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _kept_rows(batch, length, device, stream)


@lru_cache(maxsize=16)
def _kept_rows(batch: int, length: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    # The layers of a model share them, on one stream.
    return (
        torch.arange(batch, device=device),
        torch.full((batch,), length, dtype=torch.int64, device=device),
    )


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """``[B, H, Q, dv]``."""
    batch, heads, queries, _ = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    if group > 1 and queries == 1:
        # The query heads of a key/value head become its queries.
        query = query.reshape(batch, kv_heads, group, -1)
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(len(mask), kv_heads, group, length)
    elif group > 1:
        # Key/value heads become rows of the batch; their query heads read the same memory.
        query = query.reshape(batch * kv_heads, group, queries, -1)
        key, value = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (key, value))
        if mask is not None and mask.shape[1] == heads:
            mask = mask.expand(batch, -1, -1, -1).reshape(-1, group, queries, length)
        elif mask is not None:
            mask = mask.expand(batch, kv_heads, -1, -1).reshape(-1, 1, queries, length)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return mixed.reshape(batch, heads, queries, -1)
