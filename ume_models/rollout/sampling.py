"""Which token comes next: the arg-max, or a sample as transformers' ``generate`` defines it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_kernels import similarity_topk
from ume_models.rollout.sequence import Sequence

BLOCK = 16384
"""Rows of the LM head whose logits exist at a time on a GPU."""


@dataclass(frozen=True)
class Sampling:
    """How logits become a token.

    Attributes:
        temperature: divides them; 0 takes the arg-max.
        top_k: only so many of the largest remain; 0 for all.
        top_p: only the largest whose probabilities reach it remain.
        repetition_penalty: positive logits of tokens that the row has are divided by it, negative
            ones multiplied.
        seed: of the draws, which besides depend on the row alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether the arg-max of the logits is all that is asked for."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


def arg_max(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Int64 ``[B]``: the row of ``head`` ``[V, D]`` with the largest logit, the first of equals.

    The logits ``[B, V]`` never exist as a whole. On a GPU nothing here waits for the device.
    """
    if not hidden.is_cuda:
        return similarity_topk(hidden, head, 1)[1][:, 0]
    best, found = hidden.new_full((len(hidden),), -torch.inf), None
    for start in range(0, len(head), BLOCK):
        score, index = F.linear(hidden, head[start : start + BLOCK]).max(dim=1)
        index = index + start
        found = index if found is None else torch.where(score > best, index, found)
        best = torch.maximum(score, best)
    assert found is not None
    return found


def sample(
    logits: torch.Tensor, present: torch.Tensor | None, how: Sampling, uniform: torch.Tensor
) -> torch.Tensor:
    """Int64 ``[B]`` tokens.

    Args:
        logits: ``[B, V]``.
        present: bool ``[B, V]``, tokens that the row has; only read with a repetition penalty.
        how: the rules, in the order of transformers: penalty, temperature, top-k, top-p.
        uniform: float64 ``[B]`` in [0, 1): the token at that quantile is taken.
    """
    scores = logits.float()
    if how.repetition_penalty != 1:
        assert present is not None
        scaled = torch.where(
            scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty
        )
        scores = torch.where(present, scaled, scores)
    if how.temperature == 0:
        return scores.argmax(dim=1)
    scores = scores / how.temperature
    if how.top_k:
        smallest = scores.topk(min(how.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    ordered, tokens = scores.sort(dim=1, descending=True)
    summed = ordered.double().softmax(dim=1).cumsum(dim=1)
    if how.top_p < 1:
        # The first stays whatever its share is; another one if those before it do not reach top_p.
        before = F.pad(summed[:, :-1], (1, 0))
        kept = (before < how.top_p) | (torch.arange(scores.shape[1], device=scores.device) == 0)
        ordered = ordered.masked_fill(~kept, -torch.inf)
        summed = ordered.double().softmax(dim=1).cumsum(dim=1)
    place = torch.searchsorted(summed, (uniform * summed[:, -1])[:, None], right=True)
    return tokens.gather(1, place.clamp(max=scores.shape[1] - 1))[:, 0]


def draws(prompt: Sequence, seed: int, count: int) -> torch.Tensor:
    """Float64 ``[count]`` in [0, 1) of one row; they depend on seed, tokens and pictures alone."""
    digest = hashlib.sha256(f"{seed}".encode())
    digest.update(prompt.input_ids.tobytes())
    for visual in prompt.visuals:
        digest.update(repr(visual.grid).encode())
        digest.update(visual.patches.float().cpu().numpy().tobytes())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
