"""Common beginnings of prompts, computed once for a batch: keys and values are copied.

Most prompts of a batch begin alike: the system turn, the blank image of text-only inputs, the
instruction of a task. Attention is causal, so the keys and values of a beginning do not depend on
what follows. They are found by looking at the prompts, and kept for the batch alone: nothing that
was computed from weights outlives a call.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.rollout.sequence import Sequence, Visual, beginning, visual_spans

LIMIT = 8
"""Headers of a batch."""

WORTH = 8
"""Tokens that a header must save beyond the one that serves already."""


@dataclass(frozen=True)
class Header:
    """A beginning that several prompts share.

    Attributes:
        sequence: its tokens, positions and visuals.
        kv: ``[layers, 2, Hkv, n, dh]``, or None until first used.
    """

    sequence: Sequence
    kv: torch.Tensor | None = None

    def begins(self, other: Sequence) -> bool:
        """Whether ``other`` is this header followed by at least one more token.

        Positions are compared too: M-RoPE of a prefix never depends on what follows, so a
        difference means the caller supplied other positions.
        """
        n, visuals = len(self.sequence), len(self.sequence.visuals)
        return (
            len(other) > n
            and np.array_equal(other.input_ids[:n], self.sequence.input_ids)
            and np.array_equal(other.positions[:, :n], self.sequence.positions)
            and len(other.visuals) >= visuals
            and _same_visuals(self.sequence, other)
        )


class Headers:
    """What the prompts of a batch, and those with the same first visual, have in common.

    Args:
        config: names the pad ids and the merge size, which tell the tokens of a visual.
        batch: the prompts; fewer than two share nothing.
        reach: of each prompt the first token whose state is read; headers end before it.
    """

    def __init__(
        self, config: BackboneConfig, batch: Seq[Sequence], reach: Seq[int]
    ) -> None:
        self._config = config
        self._headers: list[Header] = []
        everyone = list(range(len(batch)))
        for rows in (*_by_first_visual(batch), everyone):
            if len(rows) > 1 and len(self._headers) < LIMIT:
                group = [batch[row] for row in rows]
                shared = self._shared(group, min(reach[row] for row in rows))
                self._consider(beginning(group[0], shared, config))
        self._headers.sort(key=lambda h: -len(h.sequence))

    def __len__(self) -> int:
        return len(self._headers)

    def match(
        self, sequence: Sequence, reach: int, compute: Callable[[Sequence], torch.Tensor]
    ) -> Header | None:
        """The longest header that begins ``sequence``, with keys and values; None if none does.

        Args:
            sequence: a prompt.
            reach: its first token whose state is read.
            compute: returns the ``[layers, 2, Hkv, n, dh]`` of a header's sequence.
        """
        for index, header in enumerate(self._headers):
            if len(header.sequence) <= reach and header.begins(sequence):
                if header.kv is None:
                    header = Header(header.sequence, compute(header.sequence))
                    self._headers[index] = header
                return header
        return None

    def _consider(self, header: Sequence) -> None:
        served = max((len(h.sequence) for h in self._headers if _starts(h, header)), default=0)
        if len(header) >= served + WORTH:
            self._headers.append(Header(header))

    def _shared(self, group: Seq[Sequence], count: int) -> int:
        """Leading tokens that all prompts share, at most ``count``."""
        first, *others = group
        spans = visual_spans(first, self._config)
        for other in others:
            differs = np.flatnonzero(first.input_ids[:count] != other.input_ids[:count])
            count = int(differs[0]) if differs.size else count
            for mine, theirs, (start, _) in zip(first.visuals, other.visuals, spans, strict=False):
                if start >= count:
                    break
                if not _same_visual(mine, theirs):
                    count = start
        return count


def _starts(header: Header, other: Sequence) -> bool:
    mine = header.sequence
    same = np.array_equal(mine.input_ids, other.input_ids) and _same_visuals(mine, other)
    return same or header.begins(other)


def _same_visuals(header: Sequence, other: Sequence) -> bool:
    pairs = zip(header.visuals, other.visuals, strict=False)
    return all(_same_visual(mine, theirs) for mine, theirs in pairs)


def _same_visual(a: Visual, b: Visual) -> bool:
    """Whether two visuals have the same patches."""
    if (a.grid, a.is_video, a.patches.dtype) != (b.grid, b.is_video, b.patches.dtype):
        return False
    return a.patches is b.patches or torch.equal(a.patches, b.patches.to(a.patches.device))


def _by_first_visual(batch: Seq[Sequence]) -> list[list[int]]:
    """Rows whose first visual looks alike at some 64 values; ``_shared`` compares them all."""
    groups: dict[Any, list[int]] = {}
    for row, sequence in enumerate(batch):
        key: Any = None
        if sequence.visuals:
            visual = sequence.visuals[0]
            flat = visual.patches.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].tolist()
            key = (visual.grid, visual.is_video, tuple(sample))
        groups.setdefault(key, []).append(row)
    return list(groups.values())

