"""``ume::moe_transition`` (inference), ``…_training`` and ``…_backward`` for ``torch.library``.

Opaque to ``torch.compile`` and ``torch.export``: which kernels run is decided inside, from the
tensors. Without Triton, or where its kernels do not compile, PyTorch runs there with the same
results.

Expert parameters come as lists: ``E`` tensors, or one stacked ``[E, …]``; ``shared`` has the four
parameters of the shared expert or none. ``step_value`` counts where ``step`` is None. ``strict``
makes a failed compilation an error instead of a fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ume_kernels import triton_backend
from ume_kernels.dispatch import Backend, requested
from ume_kernels.moe_transition.gradients import Backward, backward_torch, saved_for_backward
from ume_kernels.moe_transition.reference import clamp_step, moe_transition_reference
from ume_kernels.moe_transition.weights import MoEWeights, SharedExpert

NAME = "moe_transition"


def flat(weights: MoEWeights) -> tuple[Any, ...]:
    """``weights`` as the ops take them."""

    def parts(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else list(value)

    s = weights.shared
    shared = [] if s is None else [s.fc1_weight, s.fc1_bias, s.fc2_weight, s.fc2_bias]
    return (
        weights.ln_weight,
        weights.ln_bias,
        weights.step_embed,
        weights.router_weight,
        weights.router_bias,
        parts(weights.fc1_weight),
        parts(weights.fc1_bias),
        parts(weights.fc2_weight),
        parts(weights.fc2_bias),
        shared,
        weights.ln_eps,
    )


def _weights(
    ln_weight: Tensor,
    ln_bias: Tensor,
    step_embed: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    fc1_weight: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2_weight: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
    shared: Sequence[Tensor],
    eps: float,
) -> MoEWeights:
    def value(parts: Sequence[Tensor], dims: int) -> Tensor | Sequence[Tensor]:
        return parts[0] if len(parts) == 1 and parts[0].ndim == dims + 1 else parts

    return MoEWeights(
        ln_weight.contiguous(),
        ln_bias.contiguous(),
        step_embed.contiguous(),
        router_weight.contiguous(),
        router_bias.contiguous(),
        value(fc1_weight, 2),
        value(fc1_bias, 1),
        value(fc2_weight, 2),
        value(fc2_bias, 1),
        SharedExpert(*(part.contiguous() for part in shared)) if shared else None,
        eps,
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _runs(z: Tensor, strict: bool) -> bool:
    """Whether to try the kernels: insisted on, or nothing is in their way and nobody insists."""
    wanted = Backend.TRITON if strict else requested(NAME)
    if wanted is None:
        return triton_backend.check(NAME, (z,)) is None
    return wanted is Backend.TRITON


def _otherwise(
    z: Tensor,
    context: Tensor | None,
    step: Tensor | int,
    weights: MoEWeights,
    top_k: int,
    excluded: Tensor | None,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    balance = "sample" if per_sample else "batch"
    out, aux = moe_transition_reference(z, context, step, weights, top_k, excluded, balance)
    return out, torch.stack([aux["balance_loss"], aux["router_entropy"]]).float()


@torch.library.custom_op("ume::moe_transition", mutates_args=())
def _inference(
    z: Tensor,
    context: Tensor | None,
    step: Tensor | None,
    step_value: int,
    excluded: Tensor | None,
    top_k: int,
    per_sample: bool,
    strict: bool,
    ln_weight: Tensor,
    ln_bias: Tensor,
    step_embed: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    fc1_weight: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2_weight: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
    shared: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(z', [balance, entropy])`` without anything for a backward."""
    weights = _weights(
        ln_weight, ln_bias, step_embed, router_weight, router_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, shared, eps,
    )  # fmt: skip
    at = step_value if step is None else step

    def kernels() -> tuple[Tensor, Tensor]:
        from ume_kernels.moe_transition.triton_kernels import forward

        there = None if context is None else _rows(context)
        done = forward(
            _rows(z), there, at, weights.stacked(), top_k, excluded, per_sample, save=False
        )
        return done.out, done.aux

    def otherwise() -> tuple[Tensor, Tensor]:
        return _otherwise(z, context, at, weights, top_k, excluded, per_sample)

    if not _runs(z, strict):
        return otherwise()
    insisted = Backend.TRITON if strict else None
    return triton_backend.attempt(NAME, kernels, otherwise, insisted, z.device)


@_inference.register_fake
def _(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("ume::moe_transition_training", mutates_args=())
def _training(
    z: Tensor,
    context: Tensor | None,
    step: Tensor | None,
    step_value: int,
    excluded: Tensor | None,
    top_k: int,
    per_sample: bool,
    strict: bool,
    ln_weight: Tensor,
    ln_bias: Tensor,
    step_embed: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    fc1_weight: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2_weight: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
    shared: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(z', [balance, entropy], pre, probs, gates)``; the last three are for the backward."""
    weights = _weights(
        ln_weight, ln_bias, step_embed, router_weight, router_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, shared, eps,
    )  # fmt: skip
    at = step_value if step is None else step

    def kernels() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        from ume_kernels.moe_transition.triton_kernels import forward

        there = None if context is None else _rows(context)
        done = forward(
            _rows(z), there, at, weights.stacked(), top_k, excluded, per_sample, save=True
        )
        assert done.pre is not None
        return done.out, done.aux, done.pre, done.probs, done.gates

    def otherwise() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        out, aux = _otherwise(z, context, at, weights, top_k, excluded, per_sample)
        return out, aux, *saved_for_backward(z, context, at, weights, top_k, excluded)

    if not _runs(z, strict):
        return otherwise()
    insisted = Backend.TRITON if strict else None
    return triton_backend.attempt(NAME, kernels, otherwise, insisted, z.device)


def _saved(z: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``pre``, ``probs`` and ``gates``."""
    b, d = z.shape
    e = weights.num_experts
    width = e + (weights.shared is not None)
    return (
        z.new_empty(width, b, 2 * d),
        z.new_empty(b, e, dtype=torch.float32),
        z.new_empty(b, width, dtype=torch.float32),
    )


@_training.register_fake
def _(
    z: Tensor,
    context: Tensor | None,
    step: Tensor | None,
    step_value: int,
    excluded: Tensor | None,
    top_k: int,
    per_sample: bool,
    strict: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pre, probs, gates = _saved(z, _weights(*rest))
    return z.new_empty(z.shape), z.new_empty(2, dtype=torch.float32), pre, probs, gates


@torch.library.custom_op("ume::moe_transition_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_aux: Tensor,
    pre: Tensor,
    probs: Tensor,
    gates: Tensor,
    z: Tensor,
    context: Tensor | None,
    step: Tensor | None,
    step_value: int,
    excluded: Tensor | None,
    top_k: int,
    per_sample: bool,
    strict: bool,
    ln_weight: Tensor,
    ln_bias: Tensor,
    step_embed: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    fc1_weight: Sequence[Tensor],
    fc1_bias: Sequence[Tensor],
    fc2_weight: Sequence[Tensor],
    fc2_bias: Sequence[Tensor],
    shared: Sequence[Tensor],
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """Gradients of ``z`` and ``context`` (empty without one), then, if wanted, of the weights.

    The latter are those of LayerNorm, step embedding and router, then of fc1 and fc2 with the
    experts stacked ``[E', …]``, the shared one last.
    """
    weights = _weights(
        ln_weight, ln_bias, step_embed, router_weight, router_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, shared, eps,
    )  # fmt: skip
    at = step_value if step is None else step

    x = _rows(z)

    def kernels() -> Backward:
        from ume_kernels.moe_transition.triton_backward import backward

        return backward(
            grad.contiguous(), grad_aux.contiguous(), x, context is not None, pre, probs, gates,
            weights.stacked(), per_sample,
        )  # fmt: skip

    def otherwise() -> Backward:
        return backward_torch(
            grad, grad_aux, z, context is not None, pre, probs, gates, weights, per_sample
        )

    if not _runs(z, strict):
        done = otherwise()
    else:
        insisted = Backend.TRITON if strict else None
        done = triton_backend.attempt(NAME, kernels, otherwise, insisted, z.device)
    inputs = [done.grad_z, z.new_empty(0) if done.grad_context is None else done.grad_context]
    if not of_weights:
        return inputs
    # Dense matrix products over all rows: cuBLAS. Rows that did not choose an expert are 0.
    d = z.shape[1]
    off = x.float() - x.float().mean(1, keepdim=True)
    normal = off * torch.rsqrt(off.square().mean(1, keepdim=True) + eps)
    u = torch.addcmul(ln_bias.float(), normal, ln_weight.float()).to(z.dtype)
    every = pre.shape[0]
    per_expert = [
        torch.bmm(done.grad_pre.mT, u.expand(every, -1, -1)),
        done.grad_pre.sum(1),
        torch.bmm(grad.mT.expand(every, -1, -1), done.gated),
        (gates.T @ grad.float()).to(z.dtype),
    ]
    # Rows with the same step share an embedding: a product with the one-hot matrix adds them
    # without atomics.
    table = step_embed.shape[0]
    ids = clamp_step(at, z.shape[0], table, z.device)
    one_hot = (ids[:, None] == torch.arange(table, device=z.device)).float()
    by_step = done.grad_logits.T @ one_hot
    x_router = x if context is None else x + context
    grad_router = torch.cat(
        [done.grad_logits.T @ x_router.float(), by_step @ step_embed.float()], dim=1
    )
    one = [
        (done.grad_norm * normal).sum(0),
        done.grad_norm.sum(0),
        by_step.T @ router_weight[:, d:].float(),
        grad_router,
        done.grad_logits.sum(0),
    ]
    return [*inputs, *(g.to(z.dtype) for g in one), *per_expert]


@_backward.register_fake
def _(
    grad: Tensor,
    grad_aux: Tensor,
    pre: Tensor,
    probs: Tensor,
    gates: Tensor,
    z: Tensor,
    context: Tensor | None,
    step: Tensor | None,
    step_value: int,
    excluded: Tensor | None,
    top_k: int,
    per_sample: bool,
    strict: bool,
    *rest: Any,
) -> list[Tensor]:
    *own, of_weights = rest
    weights = _weights(*own)
    found = [z.new_empty(z.shape), z.new_empty(0 if context is None else z.shape)]
    if of_weights:
        found += [torch.empty_like(t) for t in own[:5]]
        d, every = weights.hidden_size, pre.shape[0]
        for shape in ((2 * d, d), (2 * d,), (d, 2 * d), (d,)):
            found.append(z.new_empty(every, *shape))
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors: list[Tensor] = []
    places: list[Any] = []
    # Tensors must go through save_for_backward, alone or in lists; the rest is kept as it is.
    for value in inputs:
        if isinstance(value, Tensor):
            places.append(("one", len(tensors)))
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            places.append(("many", range(len(tensors), len(tensors) + len(value))))
            tensors.extend(value)
        else:
            places.append(("none", value))
    ctx.places = places
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _through(ctx: Any, grad: Tensor, grad_aux: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, pre, probs, gates = ctx.saved_tensors
    args: list[Any] = []
    for kind, at in ctx.places:
        if kind == "one":
            args.append(tensors[at])
        elif kind == "many":
            args.append([tensors[i] for i in at])
        else:
            args.append(at)
    wanted = ctx.needs_input_grad
    of_weights = any(any(w) if isinstance(w, (list, tuple)) else w for w in wanted[8:18])
    found = torch.ops.ume.moe_transition_backward(
        grad, grad_aux, pre, probs, gates, *args, of_weights
    )
    # a list has a list of gradients, also of none
    result: list[Any] = [[None] * len(a) if isinstance(a, list) else None for a in args]
    result[0] = found[0]
    result[1] = None if args[1] is None else found[1]
    if of_weights:
        result[8:13] = found[2:7]
        experts = args[11].shape[0]
        for place, stack in zip(range(13, 17), found[7:], strict=True):
            given = args[place]
            whole = len(given) == 1 and given[0].ndim == stack.ndim
            result[place] = [stack[:experts]] if whole else list(stack[:experts].unbind(0))
        result[17] = [stack[experts] for stack in found[7:]] if args[17] else []
    return tuple(result)


_training.register_autograd(_through, setup_context=_setup)
