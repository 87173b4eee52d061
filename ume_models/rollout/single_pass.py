"""One pass and no more: the embedding is a state of the prompt itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ume_models.rollout.engine import Prefilled, Trace
from ume_models.rollout.sequence import Sequence


@dataclass(frozen=True)
class SinglePass:
    """The policy of embedders that read one token of the prompt.

    Attributes:
        token: index of that token in a prompt.
    """

    token: Callable[[Sequence], int]
    reserve = 0
    queries = 0
    slots = None

    def reads(self, prompt: Sequence) -> tuple[int, ...]:
        return (self.token(prompt),)

    def follow(self, rows: Prefilled, trace: bool) -> tuple[torch.Tensor, Trace | None]:
        (hidden,) = rows.states
        return hidden, Trace(hidden.float().cpu()) if trace else None
