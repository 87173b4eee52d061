"""Batched latent rollout: packed prefill, K latent steps and the suffix on a ragged arena.

    z(0)   = h(<bot>);   c = h(last <disc_emb>) | z(0) | 0
    z(k+1) = decoder(moe(z(k), c, k))      at position = the row's own KV length
    e      = normalise(decoder(suffix)[<gen_emb>])

K latent states cost K passes after the prefill: the last latent input and the forced suffix
go through the decoder as one chunk, because z(K) itself is never read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_kernels import MoETransition
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.text import Span, TextModel
from ume_models.backbone.vision import VisionModel
from ume_models.errors import CapacityError
from ume_models.rollout.arena import KVArena
from ume_models.rollout.headers import Header, HeaderCache
from ume_models.rollout.sequence import Sequence, Visual

# Patches per call of the vision tower. A thousand rows keep a CPU's matrix units busy; a GPU
# wants more. One larger image goes alone.
VISION_PATCHES = {"cpu": 2048, "cuda": 65536}


@dataclass(frozen=True)
class RolloutTrace:
    """Intermediate states, float32 on the CPU.

    Attributes:
        latents: ``[B, K, D]`` hidden state after each latent step.
        anchor: ``[B, D]`` hidden state at the last ``<disc_emb>`` (at the last prefix token
            where there is none).
        hidden: ``[B, D]`` the state that was normalised into the embedding.
    """

    latents: torch.Tensor
    anchor: torch.Tensor
    hidden: torch.Tensor


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


class LatentRollout:
    """Runs batches of unpadded sequences through backbone and adapter."""

    def __init__(
        self,
        config: BackboneConfig,
        text: TextModel,
        visual: VisionModel,
        adapter: MoETransition | None,
    ) -> None:
        self.config = config
        self.text = text
        self.visual = visual
        self.adapter = adapter
        weight = text.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.arena = KVArena(config, self.dtype, self.device)
        self.headers = HeaderCache()
        # One arena serves one batch at a time; calls from other threads wait.
        self._lock = threading.Lock()

    def hidden_at(self, batch: Seq[Sequence], tokens: Seq[int]) -> torch.Tensor:
        """Single pass: hidden state ``[B, D]`` of one token per sequence (by its index)."""
        with self._lock:
            self._check_capacity(max(len(s) for s in batch), 0)
            headers = self._headers(batch, reach=tokens)
            cache = self.arena.begin([len(s) for s in batch], 0)
            return self._prefill(batch, headers, cache, [[t] for t in tokens])

    def run(
        self, batch: Seq[Sequence], plan: LatentPlan, trace: bool = False
    ) -> tuple[torch.Tensor, RolloutTrace | None]:
        """Roll out a batch.

        Returns:
            Hidden states ``[B, D]`` at the last suffix token (after the final norm, not yet
            normalised to unit length) and, if asked for, the trace.
        """
        with self._lock:
            return self._run(batch, plan, trace)

    def _run(
        self, batch: Seq[Sequence], plan: LatentPlan, trace: bool
    ) -> tuple[torch.Tensor, RolloutTrace | None]:
        lengths = [len(s) for s in batch]
        self._check_capacity(max(lengths), plan.steps + len(plan.suffix_ids))
        anchors = [last_index(s, plan.anchor_id) for s in batch]
        headers = self._headers(batch, reach=anchors)
        cache = self.arena.begin(lengths, plan.steps + len(plan.suffix_ids))
        read = [sorted({a, n - 1}) for a, n in zip(anchors, lengths, strict=True)]
        states = self._prefill(batch, headers, cache, read)
        first, final, at = [], [], 0
        for indices in read:
            first.append(at)
            at += len(indices)
            final.append(at - 1)
        anchor, z = states[first], states[final]
        context = {"disc": anchor, "prefix_last": z, "none": None}[plan.context]
        hidden, latents = self._roll(z, context, lengths, cache, plan, trace)
        if not trace:
            return hidden, None
        return hidden, RolloutTrace(
            latents.float().cpu(), anchor.float().cpu(), hidden.float().cpu()
        )

    def _roll(
        self,
        z: torch.Tensor,
        context: torch.Tensor | None,
        prompt_lengths: Seq[int],
        cache: torch.Tensor,
        plan: LatentPlan,
        trace: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loop after the prefill; nothing in it reads a device value on the host."""
        batch = z.shape[0]
        layers, inv_freq = self.text.layer_weights(), self.text.inv_freq()
        lengths = torch.tensor(prompt_lengths, device=self.device)
        longest = max(prompt_lengths)
        latents: list[torch.Tensor] = []
        for step in range(plan.steps - 1):
            embeds = self._transition(z, context, step, plan.excluded)[:, None]
            longest += 1
            z = self.text.decode(embeds, lengths, cache, longest, layers, inv_freq)[:, 0]
            lengths = lengths + 1
            if trace:
                latents.append(z)
        suffix = torch.tensor(plan.suffix_ids, device=self.device)
        chunk = F.embedding(suffix, self.text.embed_tokens.weight).expand(batch, -1, -1)
        if plan.steps:
            last = self._transition(z, context, plan.steps - 1, plan.excluded)[:, None]
            chunk = torch.cat([last, chunk], dim=1)
        longest += chunk.shape[1]
        out = self.text.decode(chunk, lengths, cache, longest, layers, inv_freq)
        if trace and plan.steps:
            latents.append(out[:, 0])
        stacked = torch.stack(latents, 1) if latents else z.new_zeros(batch, 0, z.shape[1])
        return out[:, -1], stacked

    def _transition(
        self, z: torch.Tensor, context: torch.Tensor | None, step: int, excluded: tuple[int, ...]
    ) -> torch.Tensor:
        if self.adapter is None:
            return z
        return self.adapter(z, step, context, excluded=excluded)[0]

    def _check_capacity(self, longest: int, extra: int) -> None:
        limit = self.config.max_position_embeddings
        if longest + extra > limit:
            following = f" and the {extra} that follow" if extra else ""
            raise CapacityError(
                f"a prompt of {longest} tokens{following} exceeds the model's {limit} positions; "
                "shorten the text, take fewer latent steps or lower max_pixels"
            )

    def _headers(self, batch: Seq[Sequence], reach: Seq[int]) -> list[Header | None]:
        """A header for each sequence whose tokens to be read (``reach``) lie behind it."""
        found: list[Header | None] = []
        for sequence, token in zip(batch, reach, strict=True):
            header = self.headers.match(sequence, self._header_kv)
            usable = header is not None and token >= len(header.sequence)
            found.append(header if usable else None)
        return found

    def _header_kv(self, sequence: Sequence) -> torch.Tensor:
        arena = KVArena(self.config, self.dtype, self.device)
        cache = arena.begin([len(sequence)], 0)
        self._prefill([sequence], [None], cache, [[len(sequence) - 1]])
        return cache[:, :, 0, :, : len(sequence)].clone()

    def _prefill(
        self,
        batch: Seq[Sequence],
        headers: Seq[Header | None],
        cache: torch.Tensor,
        read: Seq[Seq[int]],
    ) -> torch.Tensor:
        """Pack, embed, insert visual tokens and prefill; states at ``read``, row after row."""
        spans: list[Span] = []
        ids: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        wanted: list[int] = []
        visuals: list[Visual] = []
        start = 0
        for slot, (sequence, header) in enumerate(zip(batch, headers, strict=True)):
            cached = 0
            if header is not None and header.kv is not None:
                cached = len(header.sequence)
                cache[:, :, slot, :, :cached] = header.kv
            skipped = 0 if header is None else len(header.sequence.visuals)
            visuals.extend(sequence.visuals[skipped:])
            spans.append(Span(slot, cached, start, len(sequence) - cached))
            ids.append(torch.from_numpy(sequence.input_ids[cached:]))
            positions.append(torch.from_numpy(sequence.positions[:, cached:]))
            wanted.extend(start + token - cached for token in read[slot])
            start += len(sequence) - cached
        packed = torch.cat(ids).to(self.device)
        embeds = F.embedding(packed, self.text.embed_tokens.weight)
        if visuals:
            is_visual = (packed == self.config.image_token_id) | (
                packed == self.config.video_token_id
            )
            embeds[is_visual] = self._visual_tokens(visuals)
        return self.text.prefill(
            embeds, torch.cat(positions, dim=1).to(self.device), spans, cache, wanted
        )

    def _visual_tokens(self, visuals: Seq[Visual]) -> torch.Tensor:
        """Visual tokens in order, in calls of limited size: the tower's activations are wide."""
        limit = VISION_PATCHES.get(self.device.type, VISION_PATCHES["cpu"])
        tokens, group, size = [], list[Visual](), 0
        for number, visual in enumerate(visuals):
            group.append(visual)
            size += visual.patches.shape[0]
            following = visuals[number + 1] if number + 1 < len(visuals) else None
            if following is None or size + following.patches.shape[0] > limit:
                patches = torch.cat([v.patches.to(self.device, self.dtype) for v in group])
                tokens.append(self.visual(patches, [v.grid for v in group]))
                group, size = [], 0
        return torch.cat(tokens)


def last_index(sequence: Sequence, token: int) -> int:
    """Index of the last occurrence of ``token``, or of the last token where there is none."""
    found = (sequence.input_ids == token).nonzero()[0]
    return int(found[-1]) if found.size else len(sequence) - 1


def unit_norm(hidden: torch.Tensor) -> torch.Tensor:
    """L2-normalised float32 rows (the official norm runs in float32 under autocast).

    Raises:
        FloatingPointError: a row is not finite, which means an overflow in the model.
    """
    out = F.normalize(hidden.float(), p=2, dim=-1)
    if not math.isfinite(float(out.sum())):
        raise FloatingPointError("an embedding is not finite; run the model in float32 or bfloat16")
    return out
