"""A score and an index as one int64 key: the larger key is the better candidate.

    key = ordered(score) << 32 | 0xFFFFFFFF − index

``ordered`` maps float32 to int32 in the same order, −0.0 as 0.0. Keys of different candidates are
different, and of equal scores the lower index has the larger key. So the k largest keys are the
same set whatever the tiles, the blocks and the order of merging. ``EMPTY`` stands for no candidate.
"""

from __future__ import annotations

import torch

EMPTY = -(1 << 63)
"""Key of no candidate: below every other. Its score is −inf and its index −1."""

MAX_CANDIDATES = 0xFFFFFFFF
"""Indices take the lower word, of which 0 is left to EMPTY."""

_LOW_WORD = 0xFFFFFFFF


def empty_keys(queries: int, k: int, device: torch.device) -> torch.Tensor:
    """``[queries, k]`` places without a candidate."""
    return torch.full((queries, k), EMPTY, dtype=torch.int64, device=device)


def pack(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Keys of float32 scores and of int64 indices of a shape that broadcasts."""
    # + 0.0 turns -0.0 into 0.0: the two are equal as numbers but not as bits.
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats, as signed integers
    return (ordered.long() << 32) | (_LOW_WORD - indices)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices of keys; −inf and −1 for EMPTY."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    absent = keys == EMPTY
    scores = bits.view(torch.float32).masked_fill(absent, float("-inf"))
    return scores, (_LOW_WORD - (keys & _LOW_WORD)).masked_fill(absent, -1)


def best(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest keys of each row, in descending order."""
    return keys.topk(k, dim=1, sorted=True).values


def best_of_segments(keys: torch.Tensor, offsets: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest keys of each segment, in descending order and filled up with EMPTY.

    Args:
        keys: ``[E]``, one segment after another.
        offsets: int64 ``[Q + 1]``: segment i is ``keys[offsets[i]:offsets[i + 1]]``.
        k: keys per segment.

    Returns:
        ``[Q, k]``.
    """
    owner = owners(offsets, keys.shape[0])
    order = keys.argsort(descending=True)
    order = order[owner[order].argsort(stable=True)]
    owner = owner[order]
    rank = torch.arange(keys.shape[0], device=keys.device) - offsets[owner]
    kept = rank < k
    found = empty_keys(offsets.shape[0] - 1, k, keys.device)
    found[owner[kept], rank[kept]] = keys[order[kept]]
    return found


def owners(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """Segment of each of ``count`` places, int64."""
    places = torch.arange(count, device=offsets.device)
    return torch.searchsorted(offsets, places, right=True) - 1
