"""Argument checks, choice of implementation and custom operators of the packed prefill.

Eager calls go straight to the implementation; under ``torch.compile`` and ``torch.export`` they
are the operators ``ume::rms_norm``, ``ume::rope_append``, ``ume::silu_mul`` and ``ume::silu_mul_``.
A call that needs a gradient is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_kernels import dispatch, triton_backend
from ume_kernels.dispatch import Backend, Check, Obstacle, needs_grad
from ume_kernels.prefill.reference import (
    rms_norm_reference,
    rope_append_reference,
    silu_mul_reference,
    silu_mul_reference_,
)

MAX_WIDTH = 65536
"""A row of the norm is held in registers."""

MAX_HEADS = 128

_GRAD = Obstacle("it has no backward and a gradient is needed")
_MIXED = Obstacle("its floating-point tensors are of different types")
_TOO_WIDE = Obstacle(f"the kernel holds a row, at most {MAX_WIDTH} values or {MAX_HEADS} heads")


def _check(op: str) -> Check:
    """When the Triton kernel of ``op`` can run; the tensors are its operands of one dtype."""

    def check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
        obstacle = triton_backend.check(op, tensors)
        if not tensors or (obstacle is not None and not obstacle.soft):
            return obstacle
        first = tensors[0]
        assert first is not None
        if any(t is not None and t.dtype != first.dtype for t in tensors):
            return _MIXED
        if needs_grad(tensors):
            return _GRAD
        if op == "rms_norm" and first.shape[-1] > MAX_WIDTH:
            return _TOO_WIDE
        if op == "rope_append" and first.shape[1] > MAX_HEADS:
            return _TOO_WIDE
        return obstacle

    return check


for _op, _operands in (("rms_norm", 2), ("rope_append", 5), ("silu_mul", 2)):
    dispatch.register(
        _op, {Backend.TRITON: _check(_op), Backend.TORCH: dispatch.always}, operands=_operands
    )


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, backend: Backend | str | None = None
) -> torch.Tensor:
    if dispatch.select("rms_norm", x, weight, backend=backend) is Backend.TORCH:
        return rms_norm_reference(x, weight, eps)

    def kernels() -> torch.Tensor:
        from ume_kernels.prefill.triton_kernels import rms_norm_triton

        return rms_norm_triton(x, weight, eps)

    return triton_backend.attempt(
        "rms_norm", kernels, lambda: rms_norm_reference(x, weight, eps), backend, x.device
    )


@torch.library.custom_op("ume::rms_norm", mutates_args=())
def _rms_norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _rms_norm(x, weight, eps)


@_rms_norm_op.register_fake
def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    backend: Backend | str | None = None,
) -> torch.Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last axis, statistics in float32.

    The normalised value is rounded to the type of ``x`` before the weight, as in transformers.

    Args:
        x: ``[…, D]`` float.
        weight: ``[D]``.
        eps: added to the mean square.
        backend: force an implementation; default as ``ume_kernels.explain`` tells.

    Returns:
        ``[…, D]`` in the type of ``x``.

    Raises:
        ValueError: the weight does not fit.
    """
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"x must be [..., D] and weight [D], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not isinstance(eps, (int, float)):
        raise ValueError(f"eps must be a number, got {type(eps).__name__}")
    if torch.compiler.is_compiling():
        if backend is None and x.is_cuda and not needs_grad((x, weight)):
            return _rms_norm_op(x, weight, eps)
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps, backend)


def _rope_append(
    arguments: tuple[torch.Tensor, ...], backend: Backend | str | None = None
) -> torch.Tensor:
    """``rope_append`` of its nine tensors, in their order."""
    q, k, v, _, _, keys, values, _, _ = arguments
    chosen = dispatch.select("rope_append", q, k, v, keys, values, backend=backend)
    if chosen is Backend.TORCH:
        return rope_append_reference(*arguments)

    def kernels() -> torch.Tensor:
        from ume_kernels.prefill.triton_kernels import rope_append_triton

        return rope_append_triton(*arguments)

    return triton_backend.attempt(
        "rope_append", kernels, lambda: rope_append_reference(*arguments), backend, q.device
    )


@torch.library.custom_op("ume::rope_append", mutates_args=("keys", "values"))
def _rope_append_op(
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
    return _rope_append((q, k, v, cos, sin, keys, values, slots, positions))


@_rope_append_op.register_fake
def _rope_append_fake(
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
    return q.new_empty(q.shape)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    backend: Backend | str | None = None,
) -> torch.Tensor:
    """Rotate q and k of T packed tokens and write k and v into the arena, in place.

    Tokens whose slot or position lies outside of the arena are not written by the kernel
    (the PyTorch path raises for them where that needs no wait).

    Args:
        q: ``[T, H, dh]``, dh even; any strides.
        k, v: ``[T, Hkv, dh]``.
        cos, sin: rotary tables of the tokens, ``[T, dh / 2]`` (both halves of a head alike) or
            ``[T, dh]``, any float type; rounded to the type of ``q`` first.
        keys, values: ``[S, Hkv, C, dh]`` with adjacent values of a head.
        slots, positions: int64 ``[T]``, where in the arena each token lies.
        backend: force an implementation; default as ``ume_kernels.explain`` tells.

    Returns:
        The rotated queries, ``[T, H, dh]``.

    Raises:
        ValueError: a shape, stride or index type does not fit; the message names it.
    """
    if q.ndim != 3 or q.shape[2] % 2 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [T, H, dh] with dh even, got {tuple(q.shape)}")
    tokens, _, dim = q.shape
    for name, new in (("k", k), ("v", v)):
        if new.ndim != 3 or (new.shape[0], new.shape[2]) != (tokens, dim) or not new.shape[1]:
            raise ValueError(f"{name} must be [{tokens}, Hkv, {dim}], got {tuple(new.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((tokens, dim // 2), (tokens, dim)) or table.shape != cos.shape:
            raise ValueError(
                f"{name} must be [{tokens}, {dim // 2}] or [{tokens}, {dim}], cos and sin alike, "
                f"got {tuple(table.shape)}"
            )
    for name, cache in (("keys", keys), ("values", values)):
        if cache.ndim != 4 or (cache.shape[1], cache.shape[3]) != (k.shape[1], dim):
            raise ValueError(
                f"{name} must be [S, {k.shape[1]}, C, {dim}], got {tuple(cache.shape)}"
            )
        if cache.stride(3) != 1:
            raise ValueError(f"the values of a head must be adjacent in {name}")
    if v.shape != k.shape or keys.shape != values.shape:
        raise ValueError("k and v, and keys and values, must have the same shape")
    for name, index in (("slots", slots), ("positions", positions)):
        if index.shape != (tokens,) or index.dtype is not torch.int64:
            raise ValueError(
                f"{name} must be int64 [{tokens}], got {index.dtype} {tuple(index.shape)}"
            )
        # On a device a look would wait; on the CPU PyTorch takes a negative index for one from
        # the end, and another row's memory.
        if index.is_cpu and tokens and not torch.compiler.is_compiling() and int(index.min()) < 0:
            raise ValueError(f"{name} must not be negative, got {int(index.min())}")
    arguments = (q, k, v, cos, sin, keys, values, slots, positions)
    if torch.compiler.is_compiling():
        if backend is None and q.is_cuda and not needs_grad(arguments):
            return _rope_append_op(*arguments)
        return rope_append_reference(*arguments)
    return _rope_append(arguments, backend)


def _silu_mul(
    gate: torch.Tensor, up: torch.Tensor, inplace: bool, backend: Backend | str | None = None
) -> torch.Tensor:
    reference = silu_mul_reference_ if inplace else silu_mul_reference
    if dispatch.select("silu_mul", gate, up, backend=backend) is Backend.TORCH:
        return reference(gate, up)

    def kernels() -> torch.Tensor:
        from ume_kernels.prefill.triton_kernels import silu_mul_triton

        return silu_mul_triton(gate, up, gate if inplace else None)

    return triton_backend.attempt(
        "silu_mul", kernels, lambda: reference(gate, up), backend, gate.device
    )


@torch.library.custom_op("ume::silu_mul", mutates_args=())
def _silu_mul_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _silu_mul(gate, up, False)


@_silu_mul_op.register_fake
def _silu_mul_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("ume::silu_mul_", mutates_args=("gate",))
def _silu_mul_inplace_op(gate: torch.Tensor, up: torch.Tensor) -> None:
    _silu_mul(gate, up, True)


def _check_gate(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.ndim == 0 or gate.shape != up.shape:
        raise ValueError(
            f"gate and up must have one shape [..., I], got {tuple(gate.shape)} and "
            f"{tuple(up.shape)}"
        )


def silu_mul(
    gate: torch.Tensor, up: torch.Tensor, *, backend: Backend | str | None = None
) -> torch.Tensor:
    """``silu(gate) * up``, the gate rounded to its type before the product.

    Args:
        gate, up: ``[…, I]`` of one shape and type; rows may be strided.
        backend: force an implementation; default as ``ume_kernels.explain`` tells.

    Returns:
        ``[…, I]`` contiguous.

    Raises:
        ValueError: the shapes differ.
    """
    _check_gate(gate, up)
    if torch.compiler.is_compiling():
        if backend is None and gate.is_cuda and not needs_grad((gate, up)):
            return _silu_mul_op(gate, up)
        return silu_mul_reference(gate, up)
    return _silu_mul(gate, up, False, backend)


def silu_mul_(
    gate: torch.Tensor, up: torch.Tensor, *, backend: Backend | str | None = None
) -> torch.Tensor:
    """``silu_mul`` into ``gate``, which is returned.

    The intermediates of a SwiGLU are by far the widest tensors of a layer; this saves one.

    Raises:
        ValueError: the shapes differ, or ``gate`` is not contiguous.
    """
    _check_gate(gate, up)
    if not gate.is_contiguous():
        raise ValueError("gate must be contiguous")
    if gate is up:
        raise ValueError("gate and up are one tensor; silu_mul does not write into its input")
    if torch.compiler.is_compiling():
        if backend is None and gate.is_cuda and not needs_grad((gate, up)):
            _silu_mul_inplace_op(gate, up)
            return gate
        return silu_mul_reference_(gate, up)
    return _silu_mul(gate, up, True, backend)
