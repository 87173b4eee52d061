"""PLUME as the official code runs it: one sample at a time, step by step, nothing skipped.

This follows ``VLM2Vec/eval_twomode.py::_latent_reasoning_generate_rep`` through transformers'
own modules: logits of the whole prefix and all hidden states, a growing cache, one call per
latent step, a separate suffix call, and the decode loop. It is the oracle of the fast engine
and the baseline of every benchmark. The one deliberate difference: the suffix call passes no
attention mask (see ``cached_forward``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ume_kernels import MoETransition
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.transformers_model import cached_forward
from ume_models.embedders.reference import SinglePassReference
from ume_models.rollout.latent import LatentPlan, RolloutTrace, last_index
from ume_models.rollout.sequence import Sequence


def official_transition(
    adapter: MoETransition,
    z: torch.Tensor,
    step: int,
    context: torch.Tensor | None,
    excluded: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter as the official module loops over it, boolean masks and host reads included.

    Returns:
        ``z' [B, D]`` and the router's probabilities ``[B, E]``.
    """
    step_ids = torch.full((z.shape[0],), step, device=z.device)
    embedded = adapter.step_embed(step_ids.clamp(0, adapter.step_embed_max_steps - 1)).to(z.dtype)
    gate_in = z + (torch.zeros_like(z) if context is None else context)
    logits = adapter.router(torch.cat([gate_in, embedded], dim=-1))
    mask = adapter.exclusion_mask(excluded)
    if mask is not None and bool(mask.any()):
        logits = logits.masked_fill(mask, float("-inf"))
    # float32 as under the official autocast
    probs = logits.float().softmax(dim=-1)
    top_probs, top_experts = probs.topk(adapter.top_k, dim=-1)
    u = adapter.ln(z)
    mixed = adapter.shared_expert(u) if adapter.shared_expert is not None else torch.zeros_like(u)
    expert_mix = torch.zeros_like(u)
    for slot in range(adapter.top_k):
        chosen = torch.zeros_like(u)
        for number, expert in enumerate(adapter.experts):
            rows = top_experts[:, slot] == number
            if rows.any():
                chosen[rows] = expert(u[rows])
        expert_mix = expert_mix + top_probs[:, slot, None].to(u.dtype) * chosen
    return z + (mixed + expert_mix), probs


class ReferenceEngine(SinglePassReference):
    """The official loop over a transformers module.

    Args:
        config: architecture.
        model: module from ``build_transformers_model``.
        adapter: the latent adapter, or None to feed hidden states back unchanged.
        eos: ids that end the decode loop.
        gen_id: id of ``<gen_emb>``.
    """

    def __init__(
        self,
        config: BackboneConfig,
        model: torch.nn.Module,
        adapter: MoETransition | None,
        eos: frozenset[int],
        gen_id: int,
    ) -> None:
        super().__init__(config, model)
        self._embedding = model.get_submodule("model.language_model.embed_tokens")
        self._head = model.get_parameter("lm_head.weight")
        self.adapter = adapter
        self.eos = eos
        self.gen_id = gen_id

    def run(
        self, sequence: Sequence, plan: LatentPlan, max_new_tokens: int, trace: bool = False
    ) -> tuple[torch.Tensor, RolloutTrace | None]:
        """One sample; hidden state ``[D]`` before normalisation, and the trace if asked for.

        ``max_new_tokens`` is the budget of the decode loop after the suffix.
        """
        hidden, cache = self._prefix(sequence)
        anchor = hidden[0, last_index(sequence, plan.anchor_id)]
        z = hidden[:, -1]
        context = {"disc": anchor[None], "prefix_last": z, "none": None}[plan.context]
        length = len(sequence)
        latents: list[torch.Tensor] = []
        for step in range(plan.steps):
            fed = z
            if self.adapter is not None:
                fed = official_transition(self.adapter, z, step, context, plan.excluded)[0]
            z = self._advance(fed[:, None], length, cache)[:, -1]
            length += 1
            latents.append(z)
        embedding = self._embedding
        suffix = torch.tensor([plan.suffix_ids], device=z.device)
        out = self._advance(embedding(suffix), length, cache)
        length += len(plan.suffix_ids)
        state = self._decode(out[:, -1], length, cache, max_new_tokens)
        if not trace:
            return state, None
        stacked = torch.cat(latents) if latents else z.new_zeros(0, z.shape[-1])
        return state, RolloutTrace(
            state[None].float().cpu(), stacked[None].float().cpu(), anchor[None].float().cpu()
        )

    def _advance(self, embeds: torch.Tensor, length: int, cache: Any) -> torch.Tensor:
        positions = torch.arange(length, length + embeds.shape[1], device=embeds.device)
        return cached_forward(self.model, embeds, positions.expand(3, 1, -1), cache)

    def _decode(
        self, last: torch.Tensor, length: int, cache: Any, max_new_tokens: int
    ) -> torch.Tensor:
        """Greedy decoding after the forced suffix; the state at the last ``<gen_emb>`` wins."""
        state = last[0]
        for _ in range(max_new_tokens):
            token = int(F.linear(last, self._head).float().argmax(dim=-1))
            embeds = self._embedding(torch.tensor([[token]], device=last.device))
            last = self._advance(embeds, length, cache)[:, -1]
            length += 1
            if token == self.gen_id:
                return last[0]
            if token in self.eos:
                break
        return state
