"""A batch whose prefill has run: what remains is the rollout, which can be timed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.rollout.engine import Prefilled as Rows
from ume_models.rollout.graphs import GraphPool
from ume_models.rollout.latent import Latent, LatentPlan
from ume_models.rollout.sequence import Sequence, build_sequence


def prompts(model: PlumeForEmbedding, rows: int, tokens: int, seed: int = 0) -> list[Sequence]:
    """``rows`` random text prompts of ``tokens`` tokens each, none of them special."""
    config = model.config
    special = set(model.tokenizer.get_added_vocab().values())
    plain = np.array([i for i in range(300, 500) if i not in special], dtype=np.int64)
    rng = np.random.default_rng(seed)
    return [build_sequence(rng.choice(plain, tokens), config) for _ in range(rows)]


def plan_of(model: PlumeForEmbedding, steps: int = 8) -> LatentPlan:
    """The default rollout: ``steps`` latents steered by ``<disc_emb>``, then the suffix."""
    return LatentPlan(steps, "disc", (), model.suffix_ids, model.tokens.disc_emb)


@dataclass(frozen=True)
class Prefilled:
    """State after the prefill of a batch.

    Attributes:
        states: ``[B, D]`` of the last prompt tokens (these prompts have no ``<disc_emb>``, so
            they are the router's context too).
        cache: ``[layers, 2, B, Hkv, C, dh]``, a copy.
        roll: runs the engine's rollout on its own arena; ``[B, D]``.
    """

    states: torch.Tensor
    cache: torch.Tensor
    roll: Callable[[], torch.Tensor]


def prefill(
    model: PlumeForEmbedding, batch: list[Sequence], plan: LatentPlan, graphs: bool = True
) -> Prefilled:
    """Run the prefill of ``batch`` and keep what the rollout starts from.

    ``graphs=False`` rolls out launch by launch.
    """
    engine = model.rollout
    lengths, layers = [len(s) for s in batch], model.model.layer_weights()
    cache = engine.arena.begin(lengths, plan.steps + len(plan.suffix_ids))
    states = engine._prefill(batch, [None] * len(batch), cache, [[n - 1] for n in lengths])
    policy = Latent(plan, model.latent_moe_transition)
    rows = Rows(engine, layers, lengths, cache, (states, states))
    pool = engine.graphs if graphs else GraphPool(None)

    def roll() -> torch.Tensor:
        kept, engine.graphs = engine.graphs, pool
        try:
            return policy.follow(rows, False)[0]
        finally:
            engine.graphs = kept

    return Prefilled(states, cache[:, :, : len(batch)].clone(), roll)
