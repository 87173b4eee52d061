"""Backward of the latent transition in PyTorch: what runs where its kernels do not compile.

Written out rather than left to autograd, which a custom op cannot use inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ume_kernels.moe_transition.reference import clamp_step, route
from ume_kernels.moe_transition.weights import MoEWeights, stack_experts


class Backward(NamedTuple):
    """Gradients on the way to the weights, and those of the inputs.

    ``grad_pre`` (before the GELU) and ``gated`` (gate times hidden state) are ``[E', B, 2D]``, 0
    where an expert was not chosen; ``grad_norm`` ``[B, D]`` (of LayerNorm's output) and
    ``grad_logits`` ``[B, E]`` are float32; ``grad_context`` is None without a context. ``E'``
    counts the shared expert.
    """

    grad_z: Tensor
    grad_context: Tensor | None
    grad_pre: Tensor
    gated: Tensor
    grad_norm: Tensor
    grad_logits: Tensor


def _first(weights: MoEWeights) -> tuple[Tensor, Tensor]:
    w, b = stack_experts(weights.fc1_weight), stack_experts(weights.fc1_bias)
    s = weights.shared
    if s is None:
        return w, b
    return torch.cat([w, s.fc1_weight[None]]), torch.cat([b, s.fc1_bias[None]])


def saved_for_backward(
    z: Tensor,
    context: Tensor | None,
    step: Tensor | int,
    weights: MoEWeights,
    top_k: int,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``pre`` ``[E', B, 2D]`` before the GELU, ``probs`` ``[B, E]`` and ``gates`` ``[B, E']``."""
    ids = clamp_step(step, z.shape[0], weights.step_embed.shape[0], z.device)
    routing = route(z, context, ids, weights, top_k, excluded)
    probs = routing.probs.float()
    gates = torch.zeros_like(probs)
    gates.scatter_(1, routing.experts, probs.gather(1, routing.experts))
    if weights.shared is not None:
        gates = F.pad(gates, (0, 1), value=1.0)
    u = F.layer_norm(z, (z.shape[-1],), weights.ln_weight, weights.ln_bias, weights.ln_eps)
    weight, bias = _first(weights)
    return u.to(z.dtype) @ weight.mT + bias[:, None], probs, gates


def backward_torch(
    grad: Tensor,
    grad_aux: Tensor,
    z: Tensor,
    has_context: bool,
    pre: Tensor,
    probs: Tensor,
    gates: Tensor,
    weights: MoEWeights,
    per_sample: bool,
) -> Backward:
    """The same values as the kernels of ``triton_backward``, with the formulas given there."""
    rows, experts = probs.shape
    d = z.shape[1]
    grad, x = grad.float(), z.float()
    weight, bias = stack_experts(weights.fc2_weight), stack_experts(weights.fc2_bias)
    if weights.shared is not None:
        weight = torch.cat([weight, weights.shared.fc2_weight[None]])
    gate = gates.T[:, :, None]
    live = gate != 0
    pre = pre.float().masked_fill(~live, 0)
    cdf = 0.5 * (1 + torch.erf(pre * 0.5**0.5))
    slope = cdf + pre * 0.3989422804014327 * torch.exp(-0.5 * pre * pre)
    back = grad @ weight.float()
    grad_pre = (gate * back * slope).masked_fill(~live, 0)
    gated = gate * pre * cdf

    dp = (back * pre * cdf).sum(-1).T[:, :experts] + grad @ bias.float().T
    dp = dp.masked_fill(gates[:, :experts] == 0, 0)
    balanced = probs if per_sample else probs.mean(0)
    dp = dp + grad_aux[0] * (2 / (experts * rows)) * (balanced - 1 / experts)
    dp = dp - grad_aux[1] / rows * (probs.clamp_min(1e-8).log() + (probs >= 1e-8))
    grad_logits = probs * (dp - (probs * dp).sum(1, keepdim=True))
    grad_router = grad_logits @ weights.router_weight[:, :d].float()

    grad_norm = (grad_pre @ _first(weights)[0].float()).sum(0)
    off = x - x.mean(1, keepdim=True)
    rstd = torch.rsqrt(off.square().mean(1, keepdim=True) + weights.ln_eps)
    normal = off * rstd
    du = grad_norm * weights.ln_weight.float()
    through = du - du.mean(1, keepdim=True) - normal * (du * normal).mean(1, keepdim=True)
    grad_z = grad + grad_router + rstd * through
    return Backward(
        grad_z.to(z.dtype),
        grad_router.to(z.dtype) if has_context else None,
        grad_pre.to(z.dtype),
        gated.to(z.dtype),
        grad_norm,
        grad_logits,
    )
