"""Embedders as transformers runs them: one sample at a time, through its own modules.

Logits of every token and all hidden states are computed and dropped, as the official codes do. It
is the oracle of the fast engine and the baseline of benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.transformers_model import cached_forward, full_forward
from ume_models.rollout.sampling import draws, sample
from ume_models.rollout.sequence import Sequence
from ume_models.rollout.tokens import Token


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

    def write(self, prompt: Sequence, policy: Token) -> tuple[torch.Tensor, list[int]]:
        """The state ``[D]`` that is the embedding, and the tokens written before it."""
        embedding = self.model.get_submodule("model.language_model.embed_tokens")
        hidden, cache = self._prefix(prompt)
        [at] = policy.reads(prompt)
        states, written = [hidden[0, at]], list[int]()
        if policy.settled(prompt):
            return states[0], written
        how = policy.sampling
        uniform = draws(prompt, how.seed, policy.budget).to(hidden.device)
        present = torch.zeros(1, len(policy.head), dtype=torch.bool, device=hidden.device)
        present[0, torch.from_numpy(prompt.input_ids).to(hidden.device)] = True
        position = int(prompt.positions.max()) + 1

        def consume(token: int) -> None:
            fed = embedding(torch.tensor([[token]], device=hidden.device))
            at = torch.full((3, 1, 1), position + len(states) - 1, device=hidden.device)
            states.append(cached_forward(self.model, fed, at, cache)[0, -1])

        stops = {*policy.stops, *([policy.token] if policy.tap == "before" else [])}
        while True:
            logits = F.linear(states[-1][None], policy.head)
            token = int(sample(logits, present, how, uniform[len(written), None])[0])
            present[0, token] = True
            written.append(token)
            if token in stops or len(written) == policy.budget or policy.ends(written):
                break
            consume(token)
        if policy.tap == "before":
            return states[-1], written
        if policy.token not in written:
            for token in (written[-1], *policy.closing) if policy.closing else ():
                consume(token)
            return states[-1], written
        reading = len(written) - written[::-1].index(policy.token)
        if reading == len(states) and policy.tap == "at_token":
            consume(policy.token)
        return states[min(reading, len(states) - 1)], written

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
