"""Argument checks and choice of implementation for the latent transition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ume_kernels import cpu_backend, dispatch, triton_backend
from ume_kernels.dispatch import Backend, Obstacle, select
from ume_kernels.moe_transition.composed import moe_transition_composed
from ume_kernels.moe_transition.custom_ops import NAME, flat
from ume_kernels.moe_transition.reference import moe_transition_reference
from ume_kernels.moe_transition.weights import MoEWeights
from ume_kernels.scalars import plain

MAX_EXPERTS = 16
"""Routed experts up to which the Triton kernels run: a row's logits are one block."""

WIDTH_MULTIPLE = 16

Balance = Literal["batch", "sample"]


def _triton_check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Whether the kernels run for ``(z, context, router weight, …)``."""
    if tensors:
        z, router = tensors[0], tensors[2] if len(tensors) > 2 else None
        assert z is not None
        limit = _limit(z.shape[-1], 1 if router is None else router.shape[0])
        if limit is not None:
            return Obstacle(limit)
    return triton_backend.check(NAME, tensors[:3])


def _limit(width: int, experts: int) -> str | None:
    if width % WIDTH_MULTIPLE:
        return f"its width must be a multiple of {WIDTH_MULTIPLE}, not {width}"
    if experts > MAX_EXPERTS:
        return f"it has at most {MAX_EXPERTS} experts, not {experts}"
    return None


def _composed_check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Whether rows are gathered per expert, for ``z`` and whatever may need a gradient."""
    if dispatch.needs_grad(tensors):
        return Obstacle("it has no backward and a gradient is needed")
    if torch.is_autocast_enabled("cpu"):
        return Obstacle("autocast changes dtypes on the way, which only plain PyTorch follows")
    return cpu_backend.composed_check(tensors)


dispatch.register(
    NAME,
    {
        Backend.TRITON: _triton_check,
        Backend.COMPOSED: _composed_check,
        Backend.TORCH: dispatch.always,
    },
    operands=1,
)


def _traced(
    device: torch.device, dtype: torch.dtype, width: int, experts: int, backend: str | None
) -> bool:
    # torch.compile cannot follow what asks the machine; it bakes this answer in.
    z = torch.empty(0, width, device=device, dtype=dtype)
    router = torch.empty(experts, 0, device=device, dtype=dtype)
    return select(NAME, z, None, router, backend=backend) is Backend.TRITON


# What torch.compiler.assume_constant_result sets; that function imports the compiler, and Triton.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def moe_transition(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: int | torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None = None,
    *,
    backend: str | Backend | None = None,
    balance: Balance = "batch",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next latent input ``z'`` from the last hidden state ``z``.

    ``z' = z + E_0(LN z) + sum_j p_{i_j} E_{i_j}(LN z)`` with the router
    ``p = softmax(W_r [z + c ; e(step)] + b_r)`` (PLUME eq. 4-5), top-k not renormalised.

    Args:
        z: ``[B, D]`` float32, float16 or bfloat16.
        context: ``[B, D]`` router context, or None for zeros.
        step: 0-based step id; an int ≥ 0, or an integer tensor ``[B]`` or ``[1]`` on the device of
            ``z``. Ids outside the table use its nearest row; a tensor is not read on the host,
            so negative ids in one are not reported.
        weights: parameters, same dtype and device as ``z``. Kernels want the experts stacked:
            without ``MoETransition.pack_experts`` every call copies them first.
        top_k: experts per row, 1 … E.
        excluded: bool ``[E]`` of experts that must not be chosen, or None. If fewer than ``top_k``
            are left, excluded ones fill up with probability 0; if none is left the output is NaN.
            Both are errors where the mask is on the CPU; elsewhere reading it would wait for the
            device, and ``MoETransition.exclusion_mask`` checks the indices instead.
        backend: force an implementation; default as ``ume_kernels.explain`` tells.
        balance: balance loss of the mean routing of the ``"batch"`` (PLUME eq. 6), or the mean of
            every ``"sample"``'s own (the official training: it calls the module with one row).

    Returns:
        ``(z' [B, D], {"balance_loss", "router_entropy"})``, the latter float32 scalars.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names it.
        BackendError: ``backend`` or ``UME_BACKEND`` asks for one that cannot run.
    """
    step, top_k = plain(step), plain(top_k)
    check_arguments(z, context, step, weights, top_k, excluded, balance)
    used = (z, context, weights.router_weight, *_tensors(weights))
    chosen = _choose(used, weights.num_experts, backend)
    # Autocast of weights in another dtype, and no rows at all, are PyTorch's.
    if chosen is Backend.TRITON and z.shape[0] > 0 and z.dtype == weights.router_weight.dtype:
        name = "moe_transition_training" if dispatch.needs_grad(used) else "moe_transition"
        at = (step, 0) if isinstance(step, torch.Tensor) else (None, int(step))
        out, aux, *_ = getattr(torch.ops.ume, name)(
            z, context, *at, excluded, top_k, balance == "sample", backend is not None,
            *flat(weights),
        )  # fmt: skip
        return out, {"balance_loss": aux[0], "router_entropy": aux[1]}
    run = moe_transition_composed if chosen is Backend.COMPOSED else moe_transition_reference
    return run(z, context, step, weights, top_k, excluded, balance)


def _choose(
    tensors: Sequence[torch.Tensor | None], experts: int, backend: str | Backend | None
) -> Backend:
    if not torch.compiler.is_compiling():
        return select(NAME, *tensors, backend=backend)
    z = tensors[0]
    assert z is not None
    name = None if backend is None else str(backend)
    # Gathering rows per expert depends on values, which a compiler cannot trace.
    triton = _traced(z.device, z.dtype, z.shape[1], experts, name)
    return Backend.TRITON if triton else Backend.TORCH


def _tensors(weights: MoEWeights) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in flat(weights)[:-1]:
        found.extend([value] if isinstance(value, torch.Tensor) else value)
    return found


def check_arguments(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: int | torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None,
    balance: str,
) -> None:
    """Raise ValueError, with its name, for what does not fit; nothing is read from a device."""
    _check_shapes(z, weights)
    experts = weights.num_experts
    if context is not None and context.shape != z.shape:
        raise ValueError(f"context must be {tuple(z.shape)} like z, got {tuple(context.shape)}")
    if not _is_int(top_k) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 … {experts}, an int, got {top_k!r}")
    if balance not in ("batch", "sample"):
        raise ValueError(f"balance must be 'batch' or 'sample', got {balance!r}")
    if isinstance(step, torch.Tensor):
        if step.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"step must be int32 or int64, got {step.dtype}")
        if step.numel() not in (1, z.shape[0]):
            raise ValueError(
                f"step has {step.numel()} elements; expected 1 or one per row ({z.shape[0]})"
            )
    elif not _is_int(step):
        raise ValueError(f"step must be an int or an integer tensor, got {step!r}")
    elif not 0 <= step < 2**63:
        raise ValueError(f"step must be 0 or more and fit int64, got {step}")
    if excluded is not None and not isinstance(excluded, torch.Tensor):
        raise ValueError(
            f"excluded must be a bool mask [{experts}], got a {type(excluded).__name__}; "
            "MoETransition.exclusion_mask makes one from indices"
        )
    for name, tensor in (("context", context), ("step", step), ("excluded", excluded)):
        if isinstance(tensor, torch.Tensor) and tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z on {z.device}")
    autocast = torch.is_autocast_enabled(z.device.type)
    named = [("context", context), *(("a weight", t) for t in _tensors(weights))]
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z on {z.device}")
        if tensor.dtype != z.dtype and not autocast:
            raise ValueError(f"{name} is {tensor.dtype}, z {z.dtype}")
    if excluded is not None:
        _check_excluded(excluded, experts, top_k)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_shapes(z: torch.Tensor, weights: MoEWeights) -> None:
    # Kernels trust these: with another shape they would read what lies beyond a tensor.
    router = weights.router_weight.shape
    # A LayerNorm that alone does not fit z is named below.
    fits = z.ndim == 2 and (
        weights.ln_weight.shape == z.shape[1:] or router[-1:] == (2 * z.shape[1],)
    )
    if not fits:
        raise ValueError(f"z must be [B, {weights.hidden_size}], got {tuple(z.shape)}")
    d, e = z.shape[1], weights.router_bias.numel()
    steps = max(weights.step_embed.shape[0], 1) if weights.step_embed.ndim else 1
    expected: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("ln_weight", weights.ln_weight, (d,)),
        ("ln_bias", weights.ln_bias, (d,)),
        ("step_embed", weights.step_embed, (steps, d)),
        ("router_weight", weights.router_weight, (e, 2 * d)),
        ("router_bias", weights.router_bias, (e,)),
    ]
    layers = {
        "fc1_weight": (2 * d, d),
        "fc1_bias": (2 * d,),
        "fc2_weight": (d, 2 * d),
        "fc2_bias": (d,),
    }
    for name, shape in layers.items():
        parts = getattr(weights, name)
        if isinstance(parts, torch.Tensor):
            expected.append((name, parts, (e, *shape)))
        elif len(parts) != e:
            raise ValueError(f"{name} has {len(parts)} experts, router_bias {e}")
        else:
            expected.extend((name, part, shape) for part in parts)
        if weights.shared is not None:
            expected.append((f"shared.{name}", getattr(weights.shared, name), shape))
    for name, tensor, wanted in expected:
        if tensor.shape != wanted:
            raise ValueError(
                f"{name} must be {list(wanted)}, got {list(tensor.shape)}: "
                f"z has width {d}, router_bias {e} experts"
            )


def _check_excluded(excluded: torch.Tensor, experts: int, top_k: int) -> None:
    if excluded.shape != (experts,) or excluded.dtype != torch.bool:
        raise ValueError(
            f"excluded must be a bool mask [{experts}], got {excluded.dtype} "
            f"{tuple(excluded.shape)}"
        )
    if torch.compiler.is_compiling() or not excluded.is_cpu or type(excluded) is not torch.Tensor:
        return
    left = experts - sum(excluded.tolist())
    if left < top_k:
        raise ValueError(f"excluded leaves {left} experts, but each row needs top_k={top_k}")
