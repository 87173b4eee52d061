"""Common beginnings of prompts, found by looking at the prompts.

Scripts do not say what their prompts have in common, but most do: the system turn, the blank image
of text-only inputs, the instruction of a task. What the prompts of a batch share is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from ume_models.backbone.config import BackboneConfig
from ume_models.rollout.headers import Header, HeaderCache, same_visual
from ume_models.rollout.sequence import Sequence, Visual

LIMIT = 8
"""Headers of a batch."""

WORTH = 8
"""Tokens that a header must save beyond the one that serves already."""


class LearntHeaders(HeaderCache):
    """What the prompts of a batch, and those with the same first visual, have in common.

    Args:
        config: names the pad ids and the merge size, which tell the tokens of a visual.
        batch: the prompts.
    """

    def __init__(self, config: BackboneConfig, batch: Seq[Sequence]) -> None:
        super().__init__()
        self.config = config
        for group in (*_by_first_visual(batch), batch):
            if len(group) > 1 and len(self._headers) < LIMIT:
                self._consider(beginning(group[0], self._shared(group), config))

    def __len__(self) -> int:
        return len(self._headers)

    def _consider(self, header: Sequence) -> None:
        served = max((len(h.sequence) for h in self._headers if _starts(h, header)), default=0)
        if len(header) >= served + WORTH:
            self.register(header)

    def _shared(self, group: Seq[Sequence]) -> int:
        """Leading tokens that all prompts share, with at least one of each left over."""
        first, *others = group
        count = min(len(s) for s in group) - 1
        spans = visual_spans(first, self.config)
        for other in others:
            differs = np.flatnonzero(first.input_ids[:count] != other.input_ids[:count])
            count = int(differs[0]) if differs.size else count
            for mine, theirs, (start, _) in zip(first.visuals, other.visuals, spans, strict=False):
                if start >= count:
                    break
                if not same_visual(mine, theirs):
                    count = start
        return count


def _starts(header: Header, other: Sequence) -> bool:
    mine = header.sequence
    same = np.array_equal(mine.input_ids, other.input_ids) and all(
        same_visual(a, b) for a, b in zip(mine.visuals, other.visuals, strict=False)
    )
    return same or header.begins(other)


def _by_first_visual(pool: Seq[Sequence]) -> list[list[Sequence]]:
    """Prompts whose first visual looks alike at some 64 values; ``_shared`` compares them all."""
    groups: dict[Any, list[Sequence]] = {}
    for sequence in pool:
        key: Any = None
        if sequence.visuals:
            visual = sequence.visuals[0]
            flat = visual.patches.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].tolist()
            key = (visual.grid, visual.is_video, tuple(sample))
        groups.setdefault(key, []).append(sequence)
    return list(groups.values())


def visual_spans(sequence: Sequence, config: BackboneConfig) -> list[tuple[int, int]]:
    """First token and end of each visual of a prompt."""
    pads = np.flatnonzero(
        np.isin(sequence.input_ids, (config.image_token_id, config.video_token_id))
    )
    spans, at = [], 0
    for visual in sequence.visuals:
        tokens = visual.patches.shape[0] // config.vision.merge_size**2
        spans.append((int(pads[at]), int(pads[at + tokens - 1]) + 1))
        at += tokens
    return spans


def beginning(sequence: Sequence, count: int, config: BackboneConfig) -> Sequence:
    """The first ``count`` tokens, fewer where that would cut a visual in two."""
    visuals: list[Visual] = []
    for visual, (start, end) in zip(sequence.visuals, visual_spans(sequence, config), strict=True):
        if end > count:
            count = min(count, start)
            break
        visuals.append(visual)
    # Copied: a header outlives the prompt, and slices would keep all of it.
    kept = tuple(Visual(v.patches.clone(), v.grid, v.is_video) for v in visuals)
    return Sequence(sequence.input_ids[:count].copy(), sequence.positions[:, :count].copy(), kept)
