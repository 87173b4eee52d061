"""Common beginnings of prompts, found by looking at the prompts.

Scripts do not say what their prompts have in common, but most do: the system turn, the blank image
of text-only inputs, the instruction of a task. What the prompts of a batch share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.rollout.headers import Header, HeaderCache, same_visual
from ume_models.rollout.sequence import Sequence, Visual

LIMIT = 8
"""Headers kept; the one not used for longest goes first."""

WORTH = 8
"""Tokens that a header must save beyond the one that serves already."""


class LearntHeaders(HeaderCache):
    """Headers of the prompts seen, at most ``LIMIT`` of them.

    Args:
        config: names the pad ids and the merge size, which tell the tokens of a visual.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self._previous: Sequence | None = None
        self._used: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._headers)

    def learn(self, batch: Seq[Sequence]) -> None:
        """Register what all prompts, and those with the same first visual, have in common.

        The last prompt of the batch before takes part, so that single prompts count too.
        """
        pool = [*batch] if self._previous is None else [self._previous, *batch]
        self._previous = batch[-1]
        for group in (*_by_first_visual(pool), pool):
            if len(group) > 1:
                self._consider(beginning(group[0], self._shared(group), self.config))

    def match(
        self, sequence: Sequence, compute: Callable[[Sequence], torch.Tensor]
    ) -> Header | None:
        found = super().match(sequence, compute)
        if found is not None:
            self._touch(found.sequence)
        return found

    def _consider(self, header: Sequence) -> None:
        if any(
            h.sequence.input_ids.size == len(header) and _same(h, header) for h in self._headers
        ):
            return
        served = max((len(h.sequence) for h in self._headers if h.begins(header)), default=0)
        if len(header) < served + WORTH:
            return
        if len(self._headers) >= LIMIT:
            held = [h.sequence for h in self._headers]
            oldest = next(s for s in (*self._used, *held) if any(s is h for h in held))
            self._headers = [h for h in self._headers if h.sequence is not oldest]
        self.register(header)
        self._touch(header)

    def _touch(self, sequence: Sequence) -> None:
        self._used = [s for s in self._used if s is not sequence][-2 * LIMIT :]
        self._used.append(sequence)

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


def _same(header: Header, sequence: Sequence) -> bool:
    return np.array_equal(header.sequence.input_ids, sequence.input_ids) and all(
        same_visual(a, b) for a, b in zip(header.sequence.visuals, sequence.visuals, strict=True)
    )


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
