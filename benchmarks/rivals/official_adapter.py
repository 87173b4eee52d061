"""The adapter as the official module runs it: masks on the host, experts one after another.

``VLM2Vec/src/model/latent_moe.py`` asks ``mask.any()`` per (slot, expert) and gathers rows with
boolean masks, so every step waits for the device several times and cannot be captured in a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels import MoETransition


class OfficialStyleAdapter(nn.Module):
    """Same parameters, same result and same ``(z', aux)`` as ``MoETransition``.

    Args:
        adapter: whose parameters to use; they are shared, not copied.
    """

    def __init__(self, adapter: MoETransition) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(
        self, z: torch.Tensor, step: int, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``z [B, D]`` to ``z' [B, D]`` and the auxiliary losses."""
        adapter = self.adapter
        ids = torch.full((z.shape[0],), step, dtype=torch.long, device=z.device)
        embedded = adapter.step_embed(ids.clamp(0, adapter.step_embed_max_steps - 1)).to(z.dtype)
        gate_in = z + (torch.zeros_like(z) if context is None else context)
        logits = adapter.router(torch.cat([gate_in, embedded], dim=-1))
        excluded = adapter._router_exclude_mask
        if excluded.any():
            logits = logits.masked_fill(excluded, float("-inf"))
        # float32 as under the official autocast
        probs = F.softmax(logits.float(), dim=-1)
        top_probs, top_experts = probs.topk(adapter.top_k, dim=-1)
        u = adapter.ln(z)
        shared = torch.zeros_like(u)
        if adapter.shared_expert is not None:
            shared = adapter.shared_expert(u)
        mix = torch.zeros_like(u)
        for slot in range(adapter.top_k):
            out = torch.zeros_like(u)
            for number, expert in enumerate(adapter.experts):
                mask = top_experts[:, slot] == number
                if mask.any():
                    out[mask] = expert(u[mask])
            mix = mix + top_probs[:, slot, None].to(u.dtype) * out
        mean = probs.mean(dim=0)
        aux = {
            "balance_loss": ((mean - 1.0 / adapter.num_experts) ** 2).mean(),
            "router_entropy": -(probs * probs.clamp_min(1e-8).log()).sum(dim=-1).mean(),
        }
        return z + (shared + mix), aux
