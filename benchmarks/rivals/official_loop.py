"""The official rollout without its prefill: the loop of ``engine="reference"`` on a kept cache."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.embedders.plume_reference import ReferenceEngine
from ume_models.rollout.latent import LatentPlan
from ume_models.rollout.sequence import Sequence


class OfficialRollout(ReferenceEngine):
    """The official loop of one sequence, starting where its prefill ended.

    Args:
        model: its weights, adapter and settings are used.
        sequence: the prompt; its prefill runs here, once.
        plan: what to roll out.
    """

    def __init__(self, model: PlumeForEmbedding, sequence: Sequence, plan: LatentPlan) -> None:
        engine = model.reference
        self.__dict__.update(engine.__dict__)
        self._sequence, self._plan = sequence, plan
        self._budget = model.options.max_new_tokens
        self._hidden, self._kept = engine._prefix(sequence)
        self.prepare()

    def prepare(self) -> None:
        """A fresh copy of the prefill's cache: the loop makes it longer. Not part of its time."""
        self._cache = copy.deepcopy(self._kept)

    def _prefix(self, sequence: Sequence) -> tuple[torch.Tensor, Any]:
        return self._hidden, self._cache

    def __call__(self) -> torch.Tensor:
        """The hidden state ``[D]`` of the embedding; needs ``prepare`` before every call."""
        return self.run(self._sequence, self._plan, self._budget)[0]
