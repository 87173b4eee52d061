"""Latent transition on a CPU around ``linear``: only the experts that some row chose are read.

On a CPU a host read costs nothing, and a step is bound by reading expert weights, so rows
are gathered per expert instead of masking the results of all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ume_kernels.linear import linear
from ume_kernels.moe_transition.reference import auxiliary, clamp_step, mix_experts, route
from ume_kernels.moe_transition.weights import MoEWeights


def moe_transition_composed(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: int | torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None = None,
    balance: str = "batch",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Same arguments, result and rounding points as ``moe_transition_reference``; no gradient."""
    step_ids = clamp_step(step, z.shape[0], weights.step_embed.shape[0], z.device)
    routing = route(z, context, step_ids, weights, top_k, excluded)
    u = F.layer_norm(z, (z.shape[-1],), weights.ln_weight, weights.ln_bias, weights.ln_eps)
    chosen = z.new_zeros(z.shape[0], top_k, z.shape[1])
    for e in range(weights.num_experts):
        row, slot = (routing.experts == e).nonzero(as_tuple=True)
        if row.numel():
            hidden = F.gelu(linear(u[row], weights.fc1_weight[e], weights.fc1_bias[e]))
            chosen[row, slot] = linear(hidden, weights.fc2_weight[e], weights.fc2_bias[e])
    shared = None
    if weights.shared is not None:
        s = weights.shared
        hidden = F.gelu(linear(u, s.fc1_weight, s.fc1_bias))
        shared = linear(hidden, s.fc2_weight, s.fc2_bias)
    return z + mix_experts(routing, chosen, shared), auxiliary(routing.probs, balance)
