"""The definitions, in eager PyTorch, rounding where transformers rounds.

rms_norm:    w * (x / sqrt(mean(x²) + eps))
rope_append: q' = RoPE(q);  K[slot, :, position] = RoPE(k);  V[slot, :, position] = v
silu_mul:    silu(g) * u
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last axis, statistics in float32.

    The normalised value is rounded to the type of ``x`` before the weight, as in transformers.
    """
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves: ``x * cos + cat(-x2, x1) * sin``; ``cos``/``sin`` broadcast over heads."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _whole_heads(table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A table ``[T, dh / 2]`` or ``[T, dh]`` as ``[T, 1, dh]`` in the type of ``like``."""
    if table.shape[-1] != like.shape[-1]:
        table = torch.cat([table, table], dim=-1)
    return table.to(like.dtype)[:, None]


def rope_append_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k of T packed tokens and write k and v into the arena.

    Args:
        q: ``[T, H, dh]``.
        k, v: ``[T, Hkv, dh]``.
        cos, sin: rotary tables of the tokens, ``[T, dh / 2]`` (both halves of a head alike) or
            ``[T, dh]``; rounded to the type of ``q`` first.
        keys, values: ``[S, Hkv, C, dh]``, written in place.
        slots, positions: int64 ``[T]``, where in the arena each token lies.

    Returns:
        The rotated queries, ``[T, H, dh]``.
    """
    cos, sin = _whole_heads(cos, q), _whole_heads(sin, q)
    keys[slots, :, positions] = apply_rope(k, cos, sin)
    values[slots, :, positions] = v
    return apply_rope(q, cos, sin)


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; the gate is rounded to its type before the product."""
    return F.silu(gate) * up


def silu_mul_reference_(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same into ``gate``."""
    return F.silu(gate, inplace=True).mul_(up)
