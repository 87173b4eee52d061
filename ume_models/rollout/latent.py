"""Latent rollout as a policy of the engine: K latent steps, then the suffix.

    z(0)   = h(<bot>);   c = h(last <disc_emb>) | z(0) | 0
    z(k+1) = decoder(moe(z(k), c, k))      at position = the row's own KV length
    e      = normalise(decoder(suffix)[<gen_emb>])

K latent states cost K passes after the prefill: the last latent input and the forced suffix
go through the decoder as one chunk, because z(K) itself is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ume_kernels import MoETransition, moe_transition
from ume_models.backbone.packed_attention import to_device
from ume_models.rollout.engine import Prefilled, Trace
from ume_models.rollout.loop import LatentLoop, Transition
from ume_models.rollout.sequence import Sequence


@dataclass(frozen=True)
class RolloutTrace(Trace):
    """Intermediate states of a latent rollout, float32 on the CPU.

    Attributes:
        hidden: as in ``Trace``.
        latents: ``[B, K, D]`` hidden state after each latent step.
        anchor: ``[B, D]`` hidden state at the last ``<disc_emb>`` (at the last prefix token
            where there is none).
    """

    latents: torch.Tensor
    anchor: torch.Tensor


@dataclass(frozen=True)
class LatentPlan:
    """What to roll out.

    Attributes:
        steps: K ≥ 0.
        context: router context, ``"disc"``, ``"prefix_last"`` or ``"none"``.
        excluded: experts the router must not choose.
        suffix_ids: forced tokens after the latents; the embedding is read at the last one.
        anchor_id: id of ``<disc_emb>``.
    """

    steps: int
    context: str
    excluded: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    anchor_id: int


@dataclass(frozen=True)
class Latent:
    """The policy of a plan.

    Attributes:
        plan: what to roll out.
        adapter: the transition between two steps; None feeds hidden states back unchanged.
    """

    plan: LatentPlan
    adapter: MoETransition | None
    slots = None

    @property
    def reserve(self) -> int:
        """Latent states and suffix."""
        return self.plan.steps + len(self.plan.suffix_ids)

    @property
    def queries(self) -> int:
        """The suffix, and the last latent state with it."""
        return len(self.plan.suffix_ids) + min(self.plan.steps, 1)

    def reads(self, prompt: Sequence) -> tuple[int, ...]:
        return last_index(prompt, self.plan.anchor_id), len(prompt) - 1

    def follow(self, rows: Prefilled, trace: bool) -> tuple[torch.Tensor, Trace | None]:
        anchor, z = rows.states
        context = {"disc": anchor, "prefix_last": z, "none": None}[self.plan.context]
        hidden, latents = self._roll(rows, z, context, trace)
        if latents is None:
            return hidden, None
        return hidden, RolloutTrace(
            hidden.float().cpu(), latents.float().cpu(), anchor.float().cpu()
        )

    def _roll(
        self, rows: Prefilled, z: torch.Tensor, context: torch.Tensor | None, trace: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Everything after the prefill: a replayed recording where there are graphs."""
        engine, cache, plan = rows.engine, rows.cache, self.plan
        batch, slots, capacity = len(rows.lengths), cache.shape[2], cache.shape[4]
        suffix = to_device(plan.suffix_ids, engine.device, torch.int64)
        mask = None if self.adapter is None else self.adapter.exclusion_mask(plan.excluded)
        rope = engine.rope_table(capacity)
        transition = self._transition(mask)
        loop = LatentLoop(engine.text, rows.layers, rope, transition, suffix, plan.steps)
        lengths = to_device(rows.lengths, engine.device, torch.int64)
        found: tuple[torch.Tensor, ...] | None = None
        if engine.graphs.enabled and not self._draws_dropout():
            inputs = {"z": z}
            if context is not None:
                inputs["context"] = context
            inputs["lengths"] = lengths
            shapes = [(slots, z.shape[1])] + [(slots, plan.steps, z.shape[1])] * trace
            found = engine.graphs.run(
                key=(
                    slots, capacity, plan.steps, plan.suffix_ids, context is not None,
                    plan.excluded, self.adapter and self.adapter.top_k, trace,
                ),
                identity=(
                    engine.arena.address, engine.weights_identity(rows.layers, self._weights())
                ),
                inputs=inputs,
                rows=slots,
                shapes=shapes,
                body=lambda static: loop.run(
                    static["z"], static.get("context"), static["lengths"], cache,
                    [capacity] * len(loop.grows), trace,
                ),
                keep=(rope, suffix, mask),
            )  # fmt: skip
        if found is None:
            bounds = [max(rows.lengths) + grown for grown in loop.grows]
            found = loop.run(z, context, lengths, cache, bounds, trace)
        return found[0][:batch], found[1][:batch] if trace else None

    def _transition(self, mask: torch.Tensor | None) -> Transition:
        adapter = self.adapter
        if adapter is None:
            return lambda z, context, step: z
        if self._draws_dropout():
            excluded = self.plan.excluded
            return lambda z, context, step: adapter(z, step, context, excluded=excluded)[0]
        weights, top_k = adapter.weights(), adapter.top_k
        return lambda z, context, step: moe_transition(z, context, step, weights, top_k, mask)[0]

    def _weights(self) -> list[torch.Tensor]:
        """What the transition reads."""
        return [] if self.adapter is None else [*self.adapter.parameters()]

    def _draws_dropout(self) -> bool:
        return self.adapter is not None and self.adapter.training and self.adapter.dropout > 0


def last_index(sequence: Sequence, token: int) -> int:
    """Index of the last occurrence of ``token``, or of the last token where there is none."""
    found = (sequence.input_ids == token).nonzero()[0]
    return int(found[-1]) if found.size else len(sequence) - 1
