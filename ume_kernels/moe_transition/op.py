"""Argument checks and choice of implementation for the latent transition."""

from __future__ import annotations

import torch

from ume_kernels.dispatch import Backend, select
from ume_kernels.moe_transition.cpu import moe_transition_cpu
from ume_kernels.moe_transition.reference import moe_transition_reference
from ume_kernels.moe_transition.weights import MoEWeights


def moe_transition(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: int | torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None = None,
    *,
    backend: str | Backend | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next latent input ``z'`` from the last hidden state ``z``.

    ``z' = z + E_0(LN z) + sum_j p_{i_j} E_{i_j}(LN z)`` with the router
    ``p = softmax(W_r [z + c ; e(step)] + b_r)`` (PLUME eq. 4-5), top-k not renormalised.

    Args:
        z: ``[B, D]`` float32, float16 or bfloat16.
        context: ``[B, D]`` router context, or None for zeros.
        step: 0-based step id; an int or int64 ``[B]``; ids above the table use its last row.
        weights: parameters, same dtype and device as ``z``.
        top_k: experts per row, 1 … E.
        excluded: bool ``[E]`` of experts that must not be chosen, or None.
        backend: force an implementation; default as ``ume_kernels.explain`` tells.

    Returns:
        ``(z' [B, D], {"balance_loss", "router_entropy"})``, the latter float32 scalars.

    Raises:
        ValueError: a shape does not fit; the message names it.
    """
    if z.ndim != 2 or z.shape[1] != weights.hidden_size:
        raise ValueError(f"z must be [B, {weights.hidden_size}], got {tuple(z.shape)}")
    if context is not None and context.shape != z.shape:
        raise ValueError(f"context must be {tuple(z.shape)} like z, got {tuple(context.shape)}")
    if not 1 <= top_k <= weights.num_experts:
        raise ValueError(f"top_k must be 1 … {weights.num_experts}, got {top_k}")
    if excluded is not None and excluded.shape != (weights.num_experts,):
        raise ValueError(
            f"excluded must be a bool mask [{weights.num_experts}], got {tuple(excluded.shape)}"
        )
    select("moe_transition", z, backend=backend)
    needs_grad = torch.is_grad_enabled() and (
        z.requires_grad or weights.router_weight.requires_grad
    )
    run = (
        moe_transition_cpu
        if z.device.type == "cpu" and not needs_grad
        else moe_transition_reference
    )
    return run(z, context, step, weights, top_k, excluded)
