"""Prompt headers computed once: their keys and values are copied, not recomputed.

A prompt begins with a constant part: the system turn and, for text-only inputs, a blank
image. Attention is causal, so its keys and values do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ume_models.rollout.sequence import Sequence, Visual


@dataclass(frozen=True)
class Header:
    """A constant beginning of prompts.

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
            and all(
                same_visual(mine, theirs)
                for mine, theirs in zip(self.sequence.visuals, other.visuals, strict=False)
            )
        )


def same_visual(a: Visual, b: Visual) -> bool:
    """Whether two visuals have the same patches."""
    if a.grid != b.grid or a.is_video != b.is_video:
        return False
    return a.patches is b.patches or torch.equal(a.patches, b.patches.to(a.patches))


class HeaderCache:
    """The headers of a model, longest match first, computed on first use."""

    def __init__(self) -> None:
        self._headers: list[Header] = []

    def register(self, sequence: Sequence) -> None:
        """Declare that many prompts begin with ``sequence``."""
        if len(sequence):
            self._headers.append(Header(sequence))
            self._headers.sort(key=lambda h: -len(h.sequence))

    def match(
        self, sequence: Sequence, compute: Callable[[Sequence], torch.Tensor]
    ) -> Header | None:
        """The longest header that begins ``sequence``, with keys and values; None if none does.

        ``compute`` returns the ``[layers, 2, Hkv, n, dh]`` of a header's sequence.
        """
        for index, header in enumerate(self._headers):
            if header.begins(sequence):
                if header.kv is None:
                    header = Header(header.sequence, compute(header.sequence))
                    self._headers[index] = header
                return header
        return None

    def forget(self) -> None:
        """Drop computed keys and values (the weights changed)."""
        self._headers = [Header(h.sequence) for h in self._headers]
