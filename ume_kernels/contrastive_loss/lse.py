"""The operator ``ume::contrastive_lse``: backend choice, gradients, and what compilers need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch

from ume_kernels import dispatch, triton_backend
from ume_kernels.contrastive_loss.pairs import (
    Inverses,
    LseOutput,
    Pairs,
    accumulation_dtype,
    finish,
    inverse_norms,
    inverses,
)
from ume_kernels.dispatch import Backend, Obstacle

Tensor = torch.Tensor
Result = TypeVar("Result")

NAME = "contrastive_loss"

DOUBLE_BACKWARD = (
    "contrastive_loss has no second derivative: its backward computes the scores anew and is not "
    "itself differentiable; contrastive_loss_reference is"
)


class _Implementation(Protocol):
    """What every backend's module offers."""

    def forward(
        self,
        q: Tensor,
        p: Tensor,
        q_inv: Tensor | None,
        p_inv: Tensor | None,
        scale: Tensor,
        pairs: Pairs,
        columns: bool,
        hardest: bool,
    ) -> LseOutput: ...

    def backward(
        self,
        q: Tensor,
        p: Tensor,
        q_inv: Tensor | None,
        p_inv: Tensor | None,
        scale: Tensor,
        pairs: Pairs,
        row_lse: Tensor,
        col_lse: Tensor,
        g_row: Tensor,
        g_col: Tensor | None,
        g_pos: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _cuda_check(tensors: Sequence[Tensor | None]) -> Obstacle | None:
    first = tensors[0] if tensors else None
    if first is not None and not first.is_cuda:
        return Obstacle(f"its tensors are on {first.device.type}")
    if not torch.cuda.is_available():
        return Obstacle("no CUDA device")
    from ume_kernels.contrastive_loss import cuda

    return cuda.check(tensors)


def _native_check(tensors: Sequence[Tensor | None]) -> Obstacle | None:
    from ume_kernels.contrastive_loss import native

    return native.check(tensors)


def _triton_check(tensors: Sequence[Tensor | None]) -> Obstacle | None:
    return triton_backend.check(NAME, tensors)


dispatch.register(
    NAME,
    {
        Backend.CUDA: _cuda_check,
        Backend.TRITON: _triton_check,
        Backend.NATIVE: _native_check,
        Backend.TORCH: dispatch.always,
    },
    operands=2,
)


_MODULES = {
    Backend.CUDA: "cuda",
    Backend.TRITON: "triton_kernels",
    Backend.NATIVE: "native",
    Backend.TORCH: "blocked",
}


def _implementation(backend: Backend) -> _Implementation:
    module = importlib.import_module(f"ume_kernels.contrastive_loss.{_MODULES[backend]}")
    return cast(_Implementation, module)


def _run(
    backend: Backend,
    device: torch.device,
    insisted: str | None,
    call: Callable[[_Implementation], Result],
) -> Result:
    if backend is not Backend.TRITON:
        return call(_implementation(backend))
    return triton_backend.attempt(
        NAME,
        lambda: call(_implementation(backend)),
        lambda: call(_implementation(Backend.TORCH)),
        insisted,
        device,
    )


def _needs_copies(backend: Backend, dtype: torch.dtype, normalize: bool) -> bool:
    # The GPU kernels round the gradient's weights to the input dtype. With two inverse norms in
    # them they leave float16's range; rows of norm one keep them inside it.
    return normalize and dtype is torch.float16 and backend in (Backend.CUDA, Backend.TRITON)


def _units(x: Tensor) -> Tensor:
    return (x.float() * inverse_norms(x)[:, None]).to(x.dtype)


def forward(
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    normalize: bool,
    columns: bool,
    hardest: bool = False,
    backend: str | None = None,
) -> LseOutput:
    """The pass on the backend that `dispatch` chooses; scale in the accumulation dtype."""
    q, p, scale = (t.detach().resolve_neg() for t in (q, p, scale))
    chosen = dispatch.select(NAME, q, p, backend=backend)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if _needs_copies(chosen, q.dtype, normalize):
            q, p, normalize = _units(q), _units(p), False
        inverse = inverses(q, p, normalize)

        conditions = pairs.contiguous()

        def call(module: _Implementation) -> LseOutput:
            return module.forward(q, p, *inverse, scale, conditions, columns, hardest)

        return _run(chosen, q.device, backend, call)


def backward(
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    pairs: Pairs,
    row_lse: Tensor,
    col_lse: Tensor,
    g_row: Tensor,
    g_col: Tensor | None,
    g_pos: Tensor,
    *,
    normalize: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dp, dscale)`` from the gradients of ``row_lse``, ``col_lse`` and ``pos``."""
    q, p, scale = (t.detach().resolve_neg() for t in (q, p, scale))
    chosen = dispatch.select(NAME, q, p, backend=backend)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        inverse = inverses(q, p, normalize)
        copies = _needs_copies(chosen, q.dtype, normalize)
        a, b = (_units(q), _units(p)) if copies else (q, p)
        given: Inverses = (None, None) if copies else inverse

        conditions = pairs.contiguous()
        # The gradient of a sum is one number expanded, which kernels would read past.
        rows, positives = g_row.contiguous(), g_pos.contiguous()
        columns = None if g_col is None else g_col.contiguous()

        def call(module: _Implementation) -> tuple[Tensor, Tensor, Tensor]:
            return module.backward(
                a, b, *given, scale, conditions, row_lse, col_lse, rows, columns, positives
            )

        dq, dp, dscale = _run(chosen, q.device, backend, call)
        if copies:
            dq, dp = (
                finish(x, inv, grad.float() * inv[:, None])
                for x, inv, grad in zip((q, p), inverse, (dq, dp), strict=True)
                if inv is not None
            )
        return dq, dp, dscale


@torch.library.custom_op("ume::contrastive_lse", mutates_args=())
def _lse_op(
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    ignore_start: Tensor | None,
    ignore_col: Tensor | None,
    row_limit: Tensor | None,
    col_limit: Tensor | None,
    offset: int,
    normalize: bool,
    columns: bool,
    hardest: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = Pairs(
        offset, row_mask, col_mask, row_group, col_group, ignore_start, ignore_col,
        row_limit, col_limit,
    )  # fmt: skip
    out = forward(
        q, p, scale, pairs,
        normalize=normalize, columns=columns, hardest=hardest, backend=backend,
    )  # fmt: skip
    return out.row_lse, out.col_lse, out.pos, out.hard, out.hard_index


@_lse_op.register_fake
def _(
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    ignore_start: Tensor | None,
    ignore_col: Tensor | None,
    row_limit: Tensor | None,
    col_limit: Tensor | None,
    offset: int,
    normalize: bool,
    columns: bool,
    hardest: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    rows = q.shape[0] if hardest else 0
    return (
        q.new_empty(q.shape[0], dtype=dtype),
        q.new_empty(p.shape[0] if columns else 0, dtype=dtype),
        q.new_empty(q.shape[0], dtype=dtype),
        q.new_empty(rows, dtype=dtype),
        q.new_empty(rows, dtype=torch.int64),
    )


@torch.library.custom_op("ume::contrastive_lse_backward", mutates_args=())
def _backward_op(
    g_row: Tensor,
    g_col: Tensor | None,
    g_pos: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    ignore_start: Tensor | None,
    ignore_col: Tensor | None,
    row_limit: Tensor | None,
    col_limit: Tensor | None,
    offset: int,
    normalize: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = Pairs(
        offset, row_mask, col_mask, row_group, col_group, ignore_start, ignore_col,
        row_limit, col_limit,
    )  # fmt: skip
    return backward(
        q, p, scale, pairs, row_lse, col_lse, g_row, g_col, g_pos,
        normalize=normalize, backend=backend,
    )  # fmt: skip


@_backward_op.register_fake
def _(
    g_row: Tensor,
    g_col: Tensor | None,
    g_pos: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), p.new_empty(p.shape), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[11:]
    ctx.save_for_backward(*inputs[:11], *output[:2])
    ctx.mark_non_differentiable(*output[3:])


def _through(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    q, p, scale, *conditions, row_lse, col_lse = ctx.saved_tensors
    offset, normalize, columns, _, backend = ctx.options
    g_row, g_col, g_pos = grads[:3]
    found = _backward_op(
        g_row, g_col if columns else None, g_pos, row_lse, col_lse, q, p, scale, *conditions,
        offset, normalize, backend,
    )  # fmt: skip
    return (*found, *[None] * 13)


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(DOUBLE_BACKWARD)


_lse_op.register_autograd(_through, setup_context=_setup)
_backward_op.register_autograd(_refuse)


def contrastive_lse(
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    normalize: bool,
    columns: bool,
    hardest: bool = False,
    backend: str | None = None,
) -> LseOutput:
    """The differentiable pass: gradients for q, p and scale from row_lse, col_lse and pos.

    Args:
        q, p: ``[N, D]``, ``[M, D]`` of one dtype and device; masked rows hold zeros.
        scale: 0-d in the accumulation dtype.
        pairs: what counts.
        normalize: take the rows' directions only.
        columns, hardest: also what `LseOutput` has of columns and of hardest negatives.
        backend: insist on one, as in ``dispatch.select``.
    """
    return LseOutput(
        *_lse_op(q, p, scale, *pairs.tensors(), pairs.offset, normalize, columns, hardest, backend)
    )
