"""Soft tokens as a transition of the latent rollout: LaSER's rule.

    z(0) = h(last prompt token);   z(k + 1) = decoder(softmax(W z(k)) E);   e = mean of z(0 … K - 1)

W is the LM head, E the embedding matrix; all rows take part, those beyond the tokenizer's too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_models.rollout.engine import Prefilled, Trace
from ume_models.rollout.latent import Latent, LatentPlan
from ume_models.rollout.loop import Transition
from ume_models.rollout.sequence import Sequence


@dataclass(frozen=True)
class SoftTokens(Latent):
    """The policy of K states. Source: LaSER, arXiv 2603.01425; its quick start is the definition.

    Attributes:
        head, embedding: ``[V, D]`` each.
    """

    head: torch.Tensor
    embedding: torch.Tensor

    def reads(self, prompt: Sequence) -> tuple[int, ...]:
        return (len(prompt) - 1,)

    def follow(self, rows: Prefilled, trace: bool) -> tuple[torch.Tensor, Trace | None]:
        [z] = rows.states
        if self.plan.steps:
            _, latents = self._roll(rows, z, None, True)
            assert latents is not None
            z = torch.cat([z[:, None], latents], dim=1).mean(dim=1)
        return z, Trace(z.float().cpu()) if trace else None

    def _transition(self, mask: torch.Tensor | None) -> Transition:
        head, embedding = self.head, self.embedding

        def soft(z: torch.Tensor, context: torch.Tensor | None, step: int) -> torch.Tensor:
            return F.linear(z, head).float().softmax(dim=-1).to(z.dtype) @ embedding

        return soft

    def _weights(self) -> list[torch.Tensor]:
        return [self.head, self.embedding]


def soft_tokens(states: int, head: torch.Tensor, embedding: torch.Tensor) -> SoftTokens:
    """The policy whose embedding is the mean of so many states (LaSER: 3)."""
    return SoftTokens(LatentPlan(states - 1, "none", (), (), -1), None, head, embedding)
