"""Argument checks, choice of implementation and custom operators of the decode step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_kernels import cpu_backend, dispatch, triton_backend
from ume_kernels.decode.reference import (
    DecodeStep,
    attend_cache_reference,
    decode_layer_reference,
    decode_step,
)
from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape
from ume_kernels.dispatch import Backend, Obstacle
from ume_kernels.linear import linear

MAX_NEW_TOKENS = 64
MAX_KERNEL_TOKENS = 8
"""New tokens per row that the kernels take; the tile of a KV head holds all of them."""

MAX_TILE = 64
"""Query heads of a KV head times new tokens, the rows of an attention tile."""


def _check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Given hidden (or q), keys, values and, for a layer, its weights."""
    if not tensors:
        return triton_backend.check("decode", tensors)
    x, keys, values = tensors[:3]
    assert x is not None
    assert keys is not None
    assert values is not None
    if any(t is not None and t.dtype != x.dtype for t in tensors):
        return Obstacle("hidden states, arena and weights differ in dtype")
    if dispatch.needs_grad(tensors):
        return Obstacle("it has no backward and a gradient is needed")
    queries = x.shape[1]
    if queries > MAX_KERNEL_TOKENS:
        return Obstacle(f"more than {MAX_KERNEL_TOKENS} new tokens per row")
    if x.ndim == 4:
        heads = x.shape[2]
    else:
        q_weight = tensors[4]
        assert q_weight is not None
        heads = q_weight.shape[0] // keys.shape[3]
    group = heads // keys.shape[1]
    if group * queries > MAX_TILE:
        return Obstacle(f"{group} query heads per KV head times {queries} tokens exceed {MAX_TILE}")
    for cache in (keys, values):
        if cache.stride(3) != 1 or cache.stride(2) != cache.shape[3]:
            return Obstacle("a token's key and value must be contiguous, tokens one after another")
    if keys.stride() != values.stride():
        return Obstacle("keys and values must be laid out alike")
    if any(t is not None and not t.is_contiguous() for t in tensors[3:]):
        return Obstacle("weights must be contiguous")
    return triton_backend.check("decode", tensors)


dispatch.register(
    "decode",
    {
        Backend.TRITON: _check,
        Backend.COMPOSED: cpu_backend.composed_check,
        Backend.TORCH: dispatch.always,
    },
    operands=3,
)


def _flat(w: DecoderLayerWeights) -> tuple[torch.Tensor | None, ...]:
    return (
        w.input_norm, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias,
        w.o_weight, w.post_norm, w.gate_weight, w.up_weight, w.down_weight,
    )  # fmt: skip


@torch.library.custom_op("ume::decode_layer", mutates_args=("keys", "values"))
def _decode_layer_op(
    hidden: torch.Tensor,
    lengths: torch.Tensor,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    input_norm: torch.Tensor,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor | None,
    v_weight: torch.Tensor,
    v_bias: torch.Tensor | None,
    o_weight: torch.Tensor,
    post_norm: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rms_eps: float,
    max_length: int,
    offsets: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    weights = DecoderLayerWeights(
        input_norm, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, o_weight, post_norm,
        gate_weight, up_weight, down_weight,
    )  # fmt: skip
    shape = LayerShape(num_heads, num_kv_heads, head_dim, rms_eps)
    rope = (cos_table, sin_table)
    step = decode_step(lengths, hidden.shape[1], max_length, rope, shape, hidden.dtype, offsets)
    return _layer(hidden, step, keys, values, weights, backend)


@_decode_layer_op.register_fake
def _(hidden: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _layer(
    hidden: torch.Tensor,
    step: DecodeStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: DecoderLayerWeights,
    backend: str | Backend | None,
) -> torch.Tensor:
    """The kernels; PyTorch if they do not compile, which overwrites what they appended."""

    def kernels() -> torch.Tensor:
        from ume_kernels.decode.triton_layer import decode_layer_triton

        return decode_layer_triton(hidden, step, keys, values, weights)

    def reference() -> torch.Tensor:
        return decode_layer_reference(hidden, step, keys, values, weights, step.shape)

    chosen = dispatch.select("decode", hidden, keys, values, *_flat(weights), backend=backend)
    if chosen is Backend.COMPOSED:
        return decode_layer_reference(hidden, step, keys, values, weights, step.shape, linear)
    if chosen is Backend.TORCH:
        return reference()
    return triton_backend.attempt("decode", kernels, reference, backend, hidden.device)


def _check_weights(w: DecoderLayerWeights, shape: LayerShape, width: int) -> None:
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(f"{shape.num_heads} heads cannot share {shape.num_kv_heads} KV heads")
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    inner = w.gate_weight.shape[0]
    biases = [b is None for b in (w.q_bias, w.k_bias, w.v_bias)]
    if any(biases) and not all(biases):
        raise ValueError("q, k and v must all have a bias, or none of them")
    expected: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("input_norm", (width,)), ("q_weight", (q, width)), ("q_bias", (q,)),
        ("k_weight", (kv, width)), ("k_bias", (kv,)), ("v_weight", (kv, width)),
        ("v_bias", (kv,)), ("o_weight", (width, q)), ("post_norm", (width,)),
        ("gate_weight", (inner, width)), ("up_weight", (inner, width)),
        ("down_weight", (width, inner)),
    )  # fmt: skip
    for name, size in expected:
        tensor = getattr(w, name)
        if tensor is not None and tuple(tensor.shape) != size:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; hidden states of width {width} and {shape} "
                f"need {size}"
            )


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
    values are appended in place. The kernels (``backend="triton"``) run five launches where the
    tuning table has Triton for every projection, read each row's tokens by its own length on the
    device, and read nothing beyond it.

    Raises:
        ValueError: a shape does not fit, or the new tokens would not fit the arena.
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [B, Q, D], got {tuple(hidden.shape)}")
    batch, queries, width = hidden.shape
    if not 1 <= queries <= MAX_NEW_TOKENS:
        raise ValueError(f"decode takes 1 … {MAX_NEW_TOKENS} new tokens per row, got {queries}")
    if (step.lengths.shape[0], step.queries) != (batch, queries):
        raise ValueError(
            f"step is for {(step.lengths.shape[0], step.queries)} tokens, "
            f"hidden has {(batch, queries)}"
        )
    if step.shape != shape or step.dtype != hidden.dtype:
        raise ValueError(
            f"step was made for {step.dtype} layers of {step.shape}, not {hidden.dtype} of {shape}"
        )
    _check_weights(weights, shape, width)
    if keys.ndim != 4:
        raise ValueError(f"keys must be [B, Hkv, C, dh], got {tuple(keys.shape)}")
    expected = (batch, shape.num_kv_heads, keys.shape[2], shape.head_dim)
    for name, cache in (("keys", keys), ("values", values)):
        if tuple(cache.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {tuple(cache.shape)}")
    if step.max_length > keys.shape[2]:
        raise ValueError(
            f"{step.max_length} tokens do not fit an arena of capacity {keys.shape[2]}"
        )
    if batch == 0:
        return torch.empty_like(hidden)
    flat = _flat(weights)
    if _traced((hidden, keys, values, *flat)):
        return _decode_layer_op(
            hidden, step.lengths, step.cos_table, step.sin_table, keys, values, *flat,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rms_eps, step.max_length,
            step.offsets, None if backend is None else str(backend),
        )  # fmt: skip
    return _layer(hidden, step, keys, values, weights, backend)


def _traced(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether to leave an operator in a graph, which chooses when the graph runs.

    A graph that needs gradients is PyTorch's.
    """
    return torch.compiler.is_compiling() and not dispatch.needs_grad(tensors)


def attend_cache(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    backend: str | Backend | None = None,
) -> torch.Tensor:
    """Attention of a few queries per row over any rows of the arena.

    See ``attend_cache_reference`` for arguments and result.

    Raises:
        ValueError: a shape does not fit.
    """
    if q.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(
            f"q must be [R, Q, H, dh], keys and values [S, Hkv, C, dh]; got {tuple(q.shape)}, "
            f"{tuple(keys.shape)}, {tuple(values.shape)}"
        )
    rows, _, heads, dim = q.shape
    if dim != keys.shape[3] or not keys.shape[1] or heads % keys.shape[1]:
        raise ValueError(
            f"{heads} query heads of size {dim} do not fit {keys.shape[1]} KV heads of size "
            f"{keys.shape[3]}"
        )
    for name, per_row in (("slots", slots), ("lengths", lengths)):
        if per_row.shape != (rows,):
            raise ValueError(f"{name} must be [{rows}], got {tuple(per_row.shape)}")
        if per_row.dtype not in (torch.int64, torch.int32) or per_row.device != q.device:
            raise ValueError(
                f"{name} must be int64 on {q.device}, got {per_row.dtype} on {per_row.device}"
            )
    if rows == 0:
        return torch.empty_like(q)
    _check_slots(slots, keys.shape[0])
    if _traced((q, keys, values)):
        wanted = None if backend is None else str(backend)
        return _attend_cache_op(q, keys, values, slots, lengths, wanted)
    return _attend(q, keys, values, slots, lengths, backend)


def _check_slots(slots: torch.Tensor, count: int) -> None:
    # On a device reading them would wait; the kernel reads nothing for a slot that does not exist.
    if torch.compiler.is_compiling() or type(slots) is not torch.Tensor or not slots.is_cpu:
        return
    outside = [slot for slot in slots.tolist() if not 0 <= slot < count]
    if outside:
        raise ValueError(f"slot {outside[0]} is not one of the arena's {count}")


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    backend: str | Backend | None,
) -> torch.Tensor:
    def kernels() -> torch.Tensor:
        from ume_kernels.decode.triton_layer import attend_triton

        return attend_triton(q, keys, values, slots, lengths, extra=0)

    def reference() -> torch.Tensor:
        return attend_cache_reference(q, keys, values, slots, lengths)

    if dispatch.select("decode", q, keys, values, backend=backend) is not Backend.TRITON:
        return reference()
    return triton_backend.attempt("decode", kernels, reference, backend, q.device)


@torch.library.custom_op("ume::attend_cache", mutates_args=())
def _attend_cache_op(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    backend: str | None,
) -> torch.Tensor:
    return _attend(q, keys, values, slots, lengths, backend)


@_attend_cache_op.register_fake
def _(q: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
