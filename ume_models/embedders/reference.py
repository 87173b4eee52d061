"""Single-pass embedders as transformers runs them: one sample at a time, through its own modules.

Logits of every token and all hidden states are computed and dropped, as the official codes do. It
is the oracle of the fast engine and the baseline of benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.transformers_model import full_forward
from ume_models.rollout.sequence import Sequence


class SinglePassReference:
    """The official forward pass over a transformers module.

    Args:
        config: architecture.
        model: module from ``build_transformers_model``.
    """

    def __init__(self, config: BackboneConfig, model: torch.nn.Module) -> None:
        self.config = config
        self.model = model

    def hidden_at(self, sequence: Sequence, token: int) -> torch.Tensor:
        """Hidden state ``[D]`` of one token after the final norm."""
        return self._prefix(sequence)[0][0, token]

    def _prefix(self, sequence: Sequence) -> tuple[torch.Tensor, Any]:
        device = next(self.model.parameters()).device
        visual: dict[str, torch.Tensor] = {}
        for is_video, values, grids in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [v for v in sequence.visuals if v.is_video is is_video]
            if chosen:
                visual[values] = torch.cat([v.patches for v in chosen]).to(device)
                visual[grids] = torch.tensor([v.grid for v in chosen], device=device)
        ids = torch.from_numpy(sequence.input_ids)[None].to(device)
        positions = torch.from_numpy(sequence.positions)[:, None].to(device)
        return full_forward(self.model, ids, positions, visual)
