"""The adapter as the official module runs it: masks on the host, experts one after another.

``VLM2Vec/src/model/latent_moe.py`` asks ``mask.any()`` per (slot, expert) and gathers rows with
boolean masks, so every step waits for the device several times and cannot be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import nn

from ume_kernels import MoETransition
from ume_kernels.moe_transition.reference import auxiliary
from ume_models.embedders.plume_reference import official_transition


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
        out, probs = official_transition(self.adapter, z, step, context, ())
        return out, auxiliary(probs)
