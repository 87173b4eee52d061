"""Latent transition with a mixture of experts: the definition, in eager PyTorch.

    p   = softmax(W_r [z + c ; e(k)] + b_r)          over all E experts, then top-k
    u   = LayerNorm(z)
    z'  = z + E_0(u) + sum_j p_{i_j} E_{i_j}(u)      top-k probabilities not renormalised

(PLUME, arXiv 2604.02073, eq. 4-5; official module ``VLM2Vec/src/model/latent_moe.py``).
Every expert is evaluated for every row and the unused results are masked: no sorting, no
data-dependent shapes and no host synchronisation. It is differentiable, the oracle of the
kernels, and what runs where no kernel does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ume_kernels.moe_transition.weights import MoEWeights


class Routing(NamedTuple):
    """Router output for a batch.

    Attributes:
        probs: ``[B, E]`` softmax over all experts, at least float32.
        weights: ``[B, k]`` probabilities of the chosen experts, in the dtype of ``z``.
        experts: ``[B, k]`` int64, chosen experts, most probable first.
    """

    probs: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor


def clamp_step(
    step: int | torch.Tensor, rows: int, max_steps: int, device: torch.device
) -> torch.Tensor:
    """Step ids as ``[rows]`` int64 in ``[0, max_steps - 1]`` (later steps share the last one).

    Raises:
        ValueError: ``step`` is a tensor with neither one nor ``rows`` elements.
    """
    if not isinstance(step, torch.Tensor):
        return torch.full(
            (rows,), min(max(int(step), 0), max_steps - 1), dtype=torch.long, device=device
        )
    ids = step.to(device=device, dtype=torch.long).reshape(-1)
    if ids.numel() == 1:
        ids = ids.expand(rows)
    if ids.numel() != rows:
        raise ValueError(f"step has {ids.numel()} elements; expected 1 or one per row ({rows})")
    return ids.clamp(0, max_steps - 1)


def route(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step_ids: torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None = None,
) -> Routing:
    """Choose experts for ``z`` ``[B, D]``; ``excluded`` is a bool mask ``[E]``.

    The softmax runs in float32 (as the official code does under autocast); exclusion sets the
    logits to -inf before it. Of equally probable experts the one with the lowest index comes first.
    """
    gate_in = z if context is None else z + context
    step_emb = F.embedding(step_ids, weights.step_embed).to(z.dtype)
    logits = F.linear(
        torch.cat([gate_in, step_emb], dim=-1), weights.router_weight, weights.router_bias
    )
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    # Not topk: between equal ones it chooses as it likes, and differently from device to device.
    ordered, experts = probs.sort(dim=-1, descending=True, stable=True)
    return Routing(probs, ordered[:, :top_k].to(z.dtype), experts[:, :top_k])


def auxiliary(probs: torch.Tensor, balance: str = "batch") -> dict[str, torch.Tensor]:
    """Balance loss (eq. 6) and mean router entropy, both scalars.

    The loss is that of the batch-mean routing, or with ``balance="sample"`` the mean of each row's.
    """
    mean = probs if balance == "sample" else probs.mean(dim=0)
    return {
        "balance_loss": ((mean - 1.0 / probs.shape[-1]) ** 2).mean(),
        "router_entropy": -(probs * probs.clamp_min(1e-8).log()).sum(dim=-1).mean(),
    }


def mix_experts(
    routing: Routing, chosen: torch.Tensor, shared: torch.Tensor | None
) -> torch.Tensor:
    """``shared + (0 + p_0 E_0 + p_1 E_1 …)`` for ``chosen`` ``[B, k, D]``, in that order.

    The order is the official one; in bfloat16 every addition rounds, so it matters.
    """
    mix = torch.zeros_like(chosen[:, 0])
    for slot in range(chosen.shape[1]):
        mix = mix + routing.weights[:, slot, None] * chosen[:, slot]
    return mix if shared is None else shared + mix


def moe_transition_reference(
    z: torch.Tensor,
    context: torch.Tensor | None,
    step: int | torch.Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: torch.Tensor | None = None,
    balance: str = "batch",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One latent transition; see the module docstring for the formula.

    Args:
        z: latent states ``[B, D]``, float.
        context: router context ``[B, D]`` in the dtype of ``z``, or None for zeros.
        step: step id, 0-based: an int, or int64 ``[B]``/``[1]``.
        weights: adapter parameters.
        top_k: experts per row.
        excluded: bool ``[E]``, experts the router must not choose, or None.
        balance: see ``auxiliary``.

    Returns:
        ``(z' [B, D] in the dtype of z, {"balance_loss", "router_entropy"} scalars)``.
    """
    step_ids = clamp_step(step, z.shape[0], weights.step_embed.shape[0], z.device)
    routing = route(z, context, step_ids, weights, top_k, excluded)
    u = F.layer_norm(z, (z.shape[-1],), weights.ln_weight, weights.ln_bias, weights.ln_eps)
    u = u.to(z.dtype)
    every = torch.stack(
        [
            F.linear(
                F.gelu(F.linear(u, weights.fc1_weight[e], weights.fc1_bias[e])),
                weights.fc2_weight[e],
                weights.fc2_bias[e],
            )
            for e in range(weights.num_experts)
        ]
    )
    rows = torch.arange(z.shape[0], device=z.device)
    chosen = every[routing.experts, rows[:, None]]
    shared = None
    if weights.shared is not None:
        s = weights.shared
        shared = F.linear(F.gelu(F.linear(u, s.fc1_weight, s.fc1_bias)), s.fc2_weight, s.fc2_bias)
    return z + mix_experts(routing, chosen, shared), auxiliary(routing.probs, balance)
