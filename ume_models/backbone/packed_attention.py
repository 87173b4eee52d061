"""Causal attention over packed prompts of different lengths.

Two ways to do the same: row by row through ``scaled_dot_product_attention`` (the CPU, float32),
and all rows at once through PyTorch's variable-length attention (CUDA, half precision). Both
rotate queries and keys, write keys and values to the arena, and let the last layer's few wanted
tokens alone attend.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ume_kernels.decode import attend_cache
from ume_kernels.prefill import rope_append
from ume_kernels.prefill.reference import apply_rope


@dataclass(frozen=True)
class Span:
    """New tokens of one row inside a packed prefill.

    Attributes:
        slot: arena slot of the row.
        cached: tokens of the row that the arena holds already (a shared header).
        start: first packed index.
        count: number of new tokens.
    """

    slot: int
    cached: int
    start: int
    count: int


class Attention(Protocol):
    """Attention of one prefill; called once per layer.

    Attributes:
        wanted: int64 ``[R]`` on the device, packed indices of the tokens that are read.
    """

    wanted: torch.Tensor

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        last: bool,
    ) -> torch.Tensor:
        """Append and attend.

        Args:
            q: ``[T, H, dh]`` queries before RoPE.
            k, v: ``[T, Hkv, dh]``, k before RoPE.
            keys, values: ``[slots, Hkv, capacity, dh]`` the layer's arena, written in place.
            last: only the wanted tokens attend.

        Returns:
            ``[T, H, dh]``, or ``[R, H, dh]`` of the wanted tokens.
        """


def choose_attention(
    spans: Sequence[Span],
    wanted: Sequence[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Attention:
    """The attention that serves the device and type of the tables ``cos``/``sin`` ``[T, dh]``."""
    if variable_length(cos.device, cos.dtype, cos.shape[-1]):
        return PackedAttention(spans, wanted, cos, sin)
    return RowAttention(spans, wanted, cos, sin)


def to_device(
    values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Host integers as a tensor, without waiting for the work that the device has queued."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


# -- variable-length attention ------------------------------------------------------------------

VarlenAttention = Callable[..., Any]


@cache
def varlen_attn() -> VarlenAttention | None:
    """PyTorch's variable-length attention, None where this build has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn as attention
    except ImportError:
        return None
    return attention


@cache
def _accepted(attention: VarlenAttention) -> frozenset[str]:
    return frozenset(inspect.signature(attention).parameters)


def variable_length(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether all rows can attend in one call: FlashAttention takes half precision on CUDA."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and varlen_attn() is not None
        and _runs(device, dtype, head_dim)
    )


@cache
def _runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try once; builds and GPUs without FlashAttention raise, and get one warning."""
    one = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        attend_packed(one, one, one, starts, starts, 1, 1, causal=True)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(
            "variable-length attention does not run here, rows attend one by one (slower, same "
            f"results): {str(error).strip().splitlines()[0][:200]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
) -> torch.Tensor:
    """Attention inside each row of a pack; causal masks are aligned to the last key of a row.

    The signature of PyTorch's function moved: ``is_causal`` (2.10) became ``window_size`` (2.11),
    and fewer key/value heads than query heads are accepted since ``enable_gqa`` (2.12).

    Args:
        q: ``[T_q, H, dh]``.
        k, v: ``[T_k, Hkv, dh]``.
        starts_q, starts_k: int32 ``[rows + 1]`` where each row begins.
        longest_q, longest_k: tokens of the longest row.
        causal: token i of n queries sees the first ``m - n + i + 1`` of its row's m keys.

    Returns:
        ``[T_q, H, dh]``.
    """
    attention = varlen_attn()
    assert attention is not None
    accepted = _accepted(attention)
    options: dict[str, Any] = {}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    group = q.shape[1] // k.shape[1]
    if group > 1:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return attention(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)


class PackedAttention:
    """All rows in one call per layer; indices are prepared once per prefill."""

    def __init__(
        self,
        spans: Sequence[Span],
        wanted: Sequence[int],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        device = cos.device
        self._cos, self._sin = cos, sin
        new = [s.count for s in spans]
        whole = [s.cached + s.count for s in spans]
        self._longest_q, self._longest_k = max(new), max(whole)
        self._starts_q = to_device([0, *accumulate(new)], device, torch.int32)
        slots = [s.slot for s in spans for _ in range(s.count)]
        positions = [s.cached + i for s in spans for i in range(s.count)]
        self._slots = to_device(slots, device, torch.int64)
        self._positions = to_device(positions, device, torch.int64)
        # Behind a header the keys of a row are gathered from the arena, header and all.
        self._gather: tuple[torch.Tensor, torch.Tensor] | None = None
        self._starts_k = self._starts_q
        if any(s.cached for s in spans):
            self._starts_k = to_device([0, *accumulate(whole)], device, torch.int32)
            at = [s.slot for s, n in zip(spans, whole, strict=True) for _ in range(n)]
            where = [i for n in whole for i in range(n)]
            self._gather = (
                to_device(at, device, torch.int64),
                to_device(where, device, torch.int64),
            )
        self.wanted = to_device(list(wanted), device, torch.int64)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        last: bool,
    ) -> torch.Tensor:
        q = rope_append(q, k, v, self._cos, self._sin, keys, values, self._slots, self._positions)
        if last:
            slots, seen = self._slots[self.wanted], self._positions[self.wanted] + 1
            return attend_cache(q[self.wanted][:, None], keys, values, slots, seen)[:, 0]
        at = self._gather or (self._slots, self._positions)
        return attend_packed(
            q,
            keys[at[0], :, at[1]],
            values[at[0], :, at[1]],
            self._starts_q,
            self._starts_k,
            self._longest_q,
            self._longest_k,
            causal=True,
        )


# -- row by row ---------------------------------------------------------------------------------


class RowAttention:
    """One ``scaled_dot_product_attention`` per row."""

    def __init__(
        self,
        spans: Sequence[Span],
        wanted: Sequence[int],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        device = cos.device
        self._spans = spans
        self._cos, self._sin = cos[:, None], sin[:, None]
        self._all = _all_queries(spans, device)
        self._some = _wanted_queries(spans, wanted, device)
        self.wanted = to_device(list(wanted), device, torch.int64)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        last: bool,
    ) -> torch.Tensor:
        k = apply_rope(k, self._cos, self._sin)
        for span in self._spans:
            new = slice(span.start, span.start + span.count)
            into = slice(span.cached, span.cached + span.count)
            keys[span.slot, :, into] = k[new].transpose(0, 1)
            values[span.slot, :, into] = v[new].transpose(0, 1)
        if last:
            picked = self.wanted
            q = apply_rope(q[picked], self._cos[picked], self._sin[picked])
        else:
            q = apply_rope(q, self._cos, self._sin)
        mixed = torch.empty_like(q)
        for slot, end, rows, mask in self._some if last else self._all:
            mixed[rows] = _attend(q[rows], keys[slot, :, :end], values[slot, :, :end], mask)
        return mixed


class _Queries(NamedTuple):
    """Tokens of one row that attend: its slot, its KV length, their packed slice, their mask.

    The mask is ``[n, length]`` bool, or None for plain causal attention of the whole row.
    """

    slot: int
    length: int
    rows: slice
    mask: torch.Tensor | None


def _causal_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    return torch.arange(length, device=positions.device) <= positions[:, None]


def _all_queries(spans: Sequence[Span], device: torch.device) -> list[_Queries]:
    """Every new token of every row; rows behind a cached header need an offset mask."""
    out = []
    for span in spans:
        end = span.cached + span.count
        mask = None
        if span.cached:
            mask = _causal_mask(torch.arange(span.cached, end, device=device), end)
        out.append(_Queries(span.slot, end, slice(span.start, span.start + span.count), mask))
    return out


def _wanted_queries(
    spans: Sequence[Span], wanted: Sequence[int], device: torch.device
) -> list[_Queries]:
    """Only the ``wanted`` packed indices; the slices index into ``wanted``."""
    out = []
    at = 0
    for span in spans:
        first = at
        while at < len(wanted) and wanted[at] < span.start + span.count:
            at += 1
        if at > first:
            end = span.cached + span.count
            positions = torch.tensor(wanted[first:at], device=device) - span.start + span.cached
            mask = _causal_mask(positions, end)
            out.append(_Queries(span.slot, end, slice(first, at), mask))
    return out


# Above this many keys, expanding KV heads once is cheaper than letting attention repeat them.
_EXPAND_FROM = 1024


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one row: q ``[n, H, dh]`` over ``[Hkv, L, dh]``; causal where mask is None."""
    group = q.shape[1] // keys.shape[0]
    if keys.shape[1] >= _EXPAND_FROM:
        keys = keys.repeat_interleave(group, dim=0)
        values = values.repeat_interleave(group, dim=0)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=keys.shape[0] != q.shape[1],
    )
    return out[0].transpose(0, 1)
