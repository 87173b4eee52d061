"""``linear``: argument checks, backend choice and the custom operator ``ume::linear``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_kernels import dispatch, native
from ume_kernels.cpu_backend import MISSING, NO_VECTORS
from ume_kernels.dispatch import Backend, Obstacle
from ume_kernels.linear import reference

MAX_ROWS = 32
"""Rows of x up to which the native kernel is preferred; above, the GEMM of oneDNN (bf16) or MKL
(fp32) has enough reuse. In fp32 on Zen 4, one thread, 32 rows still take 0.65 to 0.8 of MKL's time
with AVX-512 and 0.75 to 0.96 with AVX2, where 48 rows can take longer."""

MAX_ROWS_WITH_AMX = 4
"""The same for bf16 on processors with bf16 matrix tiles. oneDNN uses those tiles and the native
kernel does not, so only the bandwidth-bound few rows are ours. From the design of the two, not
measured."""

_C = native.module
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_max_rows = {
    torch.bfloat16: MAX_ROWS_WITH_AMX if _C is not None and _C.cpu_has_amx_bf16() else MAX_ROWS,
    torch.float32: MAX_ROWS,
}
_has_vectors = _C is not None and _C.cpu_isa() != "scalar"

_DTYPE = Obstacle("x, weight and bias must be all bfloat16 or all float32, on the CPU")
_AUTOCAST = Obstacle("autocast wants another dtype than that of x")
_SUBCLASS = Obstacle("x or weight is a tensor subclass, whose own rules PyTorch follows")
_LAYOUT = Obstacle("the rows of weight and the bias must be contiguous")
_GRAD = Obstacle("it has no backward and a gradient is needed")
_SHAPE = Obstacle("x [..., K], weight [N, K] and bias [N] must fit and not be empty")
_TOO_MANY_ROWS = {
    dtype: Obstacle(f"more than {rows} rows", soft=True) for dtype, rows in _max_rows.items()
}


def _is_ours(x: torch.Tensor) -> bool:
    """Whether x is of a kind that the native kernel knows."""
    return x.is_cpu and x.dtype in _max_rows


def _cast_away(x: torch.Tensor) -> bool:
    """Whether ``F.linear`` would cast x, because it runs under autocast."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not x.dtype


def _native_check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Whether the native kernel can (hard obstacles) and should (soft ones) run."""
    if _C is None:
        return MISSING
    if not tensors:
        return None if _has_vectors else NO_VECTORS
    x, weight, bias = tensors
    assert x is not None
    assert weight is not None
    if not _is_ours(x) or weight.dtype is not x.dtype or not weight.is_cpu:
        return _DTYPE
    if _cast_away(x):
        return _AUTOCAST
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return _SUBCLASS
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _GRAD
    if weight.dim() != 2 or x.dim() == 0 or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return _SHAPE
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        return _LAYOUT
    if bias is not None:
        if bias.dtype is not x.dtype or not bias.is_cpu:
            return _DTYPE
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            return _SHAPE
        if bias.stride(0) != 1:
            return _LAYOUT
    if not _has_vectors:
        return NO_VECTORS
    if x.numel() > _max_rows[x.dtype] * weight.shape[1]:
        return _TOO_MANY_ROWS[x.dtype]
    return None


dispatch.register(
    "linear", {Backend.NATIVE: _native_check, Backend.TORCH: dispatch.always}, operands=3
)


def _run_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert _C is not None
    n, k = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    kernel = _C.linear_bf16 if x.dtype is torch.bfloat16 else _C.linear_fp32
    kernel(
        y.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x.numel() // k,
        n,
        k,
        k,
        weight.stride(0),
        torch.get_num_threads(),
    )
    return y


def _eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    backend: Backend | str | None = None,
) -> torch.Tensor:
    if dispatch.select("linear", x, weight, bias, backend=backend) is Backend.NATIVE:
        return _run_native(x, weight, bias)
    return reference.linear(x, weight, bias)


@torch.library.custom_op("ume::linear", mutates_args=())
def _linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _eager(x, weight, bias)


@_linear_op.register_fake
def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: Backend | str | None = None,
) -> torch.Tensor:
    """y = x weightᵀ + bias, with the result contract of ``torch.nn.functional.linear``.

    x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` or None → ``[..., N]``, any dtype and device.

    On the CPU, bf16 or fp32 inputs of few rows (``MAX_ROWS``) that need no gradient go to the
    native kernel. It reads the weights as they lie at memory speed and accumulates in fp32, bf16
    is rounded once, as PyTorch does, and the result of a row is bit-identical whatever the other
    rows are. Everything else is PyTorch: mixed dtypes and autocast to another dtype too.

    `backend` or ``UME_BACKEND`` insists on one; BackendError when it cannot run.
    """
    if torch.compiler.is_compiling():
        # The native choice is taken when the graph runs; a graph that needs gradients is PyTorch's.
        needs_grad = dispatch.needs_grad((x, weight, bias))
        if backend is None and not needs_grad and _is_ours(x) and not _cast_away(x):
            return _linear_op(x, weight, bias)
        return reference.linear(x, weight, bias)
    return _eager(x, weight, bias, backend)
