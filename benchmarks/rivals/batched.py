"""PLUME as one makes it fast with transformers: padded batches, no logits, static buffers.

The prompts of a batch are padded on the left and run through transformers' model without its head;
the rollout is that of ``static_cache``. What it lacks: packed prompts without padding, the constant
header computed once, sorted batches, kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.prefilled import plan_of
from benchmarks.rivals.static_cache import StaticCacheRollout
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.processing import PreparedItem
from ume_models.rollout.engine import unit_norm
from ume_models.rollout.latent import last_index
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.sequence import Visual, build_sequence


class BatchedTransformers:
    """Items of one model in padded batches.

    Args:
        model: its weights and its processor are used.
        batch: rows at a time.
        compiled: compile the rollout; worth it on a GPU.
    """

    def __init__(self, model: PlumeForEmbedding, batch: int, compiled: bool = False) -> None:
        self.model, self.batch, self.compiled = model, batch, compiled
        self.plan = plan_of(model)
        self._rollouts: dict[tuple[int, int], StaticCacheRollout] = {}

    @torch.no_grad()
    def encode(self, items: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Unit vectors float32 ``[N, D]`` of items, prepared in the same thread."""
        processor, rows = self.model.processor, []
        plans = processor.plan(list(items), "raise")
        for start in range(0, len(plans), self.batch):
            prompts = [self._prompt(processor.load(p)) for p in plans[start : start + self.batch]]
            rows.append(self._embed(prompts).cpu())
        return torch.cat(rows)

    def _prompt(self, item: PreparedItem) -> Prompt:
        visuals = []
        for values, grid, is_video in (
            (item.pixel_values, item.image_grid_thw, False),
            (item.pixel_values_videos, item.video_grid_thw, True),
        ):
            if values is not None and grid is not None:
                [(t, h, w)] = grid.tolist()
                visuals.append(Visual(values, (t, h, w), is_video))
        ids = np.concatenate([item.input_ids.numpy(), np.array(self.model.prefix_ids)])
        return build_sequence(ids, self.model.config, visuals)

    def _embed(self, prompts: list[Prompt]) -> torch.Tensor:
        device, longest = self.model.device, max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        positions = torch.ones(3, len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :] = torch.from_numpy(prompt.input_ids)
            mask[row, -len(prompt) :] = 1
            positions[:, row, -len(prompt) :] = torch.from_numpy(prompt.positions)
        visual: dict[str, torch.Tensor] = {}
        for is_video, values, grids in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [v for p in prompts for v in p.visuals if v.is_video is is_video]
            if chosen:
                visual[values] = torch.cat([v.patches for v in chosen]).to(device)
                visual[grids] = torch.tensor([v.grid for v in chosen], device=device)
        out = self.model.reference.model.model(
            input_ids=ids.to(device), attention_mask=mask.to(device),
            position_ids=positions.to(device), use_cache=True, return_dict=True, **visual,
        )  # fmt: skip
        hidden, pads = out.last_hidden_state, longest - mask.sum(1)
        anchors = torch.tensor([last_index(p, self.plan.anchor_id) for p in prompts]) + pads
        anchor = hidden[torch.arange(len(prompts)), anchors]
        roll = self._rollout(len(prompts), longest)
        roll.load(_stacked(out.past_key_values), pads.to(device))
        return unit_norm(roll(hidden[:, -1], anchor, longest))

    def _rollout(self, rows: int, tokens: int) -> StaticCacheRollout:
        """Buffers for so many tokens, rounded up so that similar batches share them."""
        capacity = -(-(tokens + self.plan.steps + len(self.plan.suffix_ids)) // 64) * 64
        if (rows, capacity) not in self._rollouts:
            adapter = self.model.latent_moe_transition
            assert adapter is not None
            self._rollouts[rows, capacity] = StaticCacheRollout(
                self.model.config, self.model.model, adapter, self.plan.suffix_ids,
                self.plan.steps, rows, capacity, self.compiled,
            )  # fmt: skip
        return self._rollouts[rows, capacity]


def _stacked(cache: Any) -> torch.Tensor:
    """``[layers, 2, B, Hkv, C, dh]`` of transformers' cache, whatever its version."""
    if hasattr(cache, "layers"):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    else:
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    return torch.stack([torch.stack(pair) for pair in pairs])
