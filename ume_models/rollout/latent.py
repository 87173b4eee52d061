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
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from ume_kernels import Backend, DecoderLayerWeights, MoETransition, moe_transition
from ume_kernels.dispatch import select
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.packed_attention import Span, to_device
from ume_models.backbone.text import RopeTable, TextModel
from ume_models.backbone.vision import VisionModel
from ume_models.errors import CapacityError
from ume_models.rollout.arena import KVArena
from ume_models.rollout.buckets import capacity_bucket
from ume_models.rollout.graphs import GraphPool
from ume_models.rollout.headers import Header, HeaderCache
from ume_models.rollout.loop import LatentLoop, Transition
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
    """Runs batches of unpadded sequences through backbone and adapter.

    Args:
        config, text, visual, adapter: the model.
        graphs: recordings of the loop after the prefill; the default records CUDA graphs where
            there is a CUDA device.
    """

    def __init__(
        self,
        config: BackboneConfig,
        text: TextModel,
        visual: VisionModel,
        adapter: MoETransition | None,
        graphs: GraphPool | None = None,
    ) -> None:
        self.config = config
        self.text = text
        self.visual = visual
        self.adapter = adapter
        weight = text.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs = GraphPool.for_device(self.device) if graphs is None else graphs
        bucketed = self.graphs.enabled or self.device.type == "cuda"
        self.arena = KVArena(config, self.dtype, self.device, bucketed, self.graphs.clear)
        self.headers = HeaderCache()
        # One arena serves one batch at a time; calls from other threads wait.
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._rope: RopeTable | None = None
        self._suffixes: dict[tuple[int, ...], torch.Tensor] = {}
        self._masks: dict[tuple[int, ...], torch.Tensor | None] = {}

    def hidden_at(self, batch: Seq[Sequence], tokens: Seq[int]) -> torch.Tensor:
        """Single pass: hidden state ``[B, D]`` of one token per sequence (by its index)."""
        with self._exclusive():
            self._check_capacity(max(len(s) for s in batch), 0)
            headers = self._headers(batch, reach=tokens)
            finite = self._reads_unused(self.text.layer_weights()[0], 1)
            cache = self.arena.begin([len(s) for s in batch], 0, finite)
            return self._prefill(batch, headers, cache, [[t] for t in tokens])

    def run(
        self, batch: Seq[Sequence], plan: LatentPlan, trace: bool = False
    ) -> tuple[torch.Tensor, RolloutTrace | None]:
        """Roll out a batch.

        Returns:
            Hidden states ``[B, D]`` at the last suffix token (after the final norm, not yet
            normalised to unit length) and, if asked for, the trace.
        """
        with self._exclusive():
            return self._run(batch, plan, trace)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One batch at a time: on the host by a lock, on the device by an event.

        Callers may be on different streams, and the arena is written by all of them.
        """
        with self._lock:
            if self.device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream(self.device)
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def _run(
        self, batch: Seq[Sequence], plan: LatentPlan, trace: bool
    ) -> tuple[torch.Tensor, RolloutTrace | None]:
        lengths = [len(s) for s in batch]
        extra = plan.steps + len(plan.suffix_ids)
        self._check_capacity(max(lengths), extra)
        anchors = [last_index(s, plan.anchor_id) for s in batch]
        headers = self._headers(batch, reach=anchors)
        layers = self.text.layer_weights()
        finite = self._reads_unused(layers[0], len(plan.suffix_ids) + min(plan.steps, 1))
        cache = self.arena.begin(lengths, extra, finite)
        read = [sorted({a, n - 1}) for a, n in zip(anchors, lengths, strict=True)]
        first, final, at = [], [], 0
        for indices in read:
            first.append(at)
            at += len(indices)
            final.append(at - 1)
        picks = to_device([first, final], self.device, torch.int64)
        states = self._prefill(batch, headers, cache, read)
        anchor, z = states[picks[0]], states[picks[1]]
        context = {"disc": anchor, "prefix_last": z, "none": None}[plan.context]
        hidden, latents = self._roll(z, context, lengths, cache, plan, layers, trace)
        if latents is None:
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
        layers: Seq[DecoderLayerWeights],
        trace: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loop after the prefill, replayed where graphs are."""
        batch, rows, capacity = len(prompt_lengths), cache.shape[2], cache.shape[4]
        suffix = self._suffix(plan.suffix_ids)
        mask = self._mask(plan.excluded)
        rope = self._rope_table(capacity)
        transition = self._transition(mask, plan.excluded)
        loop = LatentLoop(self.text, layers, rope, transition, suffix, plan.steps)
        found: tuple[torch.Tensor, ...] | None = None
        if self.graphs.enabled and not self._draws_dropout():
            inputs = {"z": z}
            if context is not None:
                inputs["context"] = context
            inputs["lengths"] = to_device(prompt_lengths, self.device, torch.int64)
            shapes = [(rows, z.shape[1])] + [(rows, plan.steps, z.shape[1])] * trace
            found = self.graphs.run(
                key=(
                    rows, capacity, plan.steps, plan.suffix_ids, context is not None,
                    plan.excluded, trace,
                ),
                identity=(self.arena.address, self._weights_identity(layers)),
                inputs=inputs,
                rows=rows,
                shapes=shapes,
                body=lambda static: loop.run(
                    static["z"], static.get("context"), static["lengths"], cache,
                    [capacity] * len(loop.grows), trace,
                ),
                keep=(rope, suffix, mask),
            )  # fmt: skip
        if found is None:
            lengths = to_device(prompt_lengths, self.device, torch.int64)
            bounds = [max(prompt_lengths) + grown for grown in loop.grows]
            found = loop.run(z, context, lengths, cache, bounds, trace)
        return found[0][:batch], found[1][:batch] if trace else None

    def _transition(self, mask: torch.Tensor | None, excluded: tuple[int, ...]) -> Transition:
        adapter = self.adapter
        if adapter is None:
            return lambda z, context, step: z
        if self._draws_dropout():
            return lambda z, context, step: adapter(z, step, context, excluded=excluded)[0]
        weights, top_k = adapter.weights(), adapter.top_k
        return lambda z, context, step: moe_transition(z, context, step, weights, top_k, mask)[0]

    def _draws_dropout(self) -> bool:
        return self.adapter is not None and self.adapter.training and self.adapter.dropout > 0

    def _mask(self, excluded: tuple[int, ...]) -> torch.Tensor | None:
        # Kept: a copy from the host has no place in a graph.
        if excluded not in self._masks:
            adapter = self.adapter
            self._masks[excluded] = None if adapter is None else adapter.exclusion_mask(excluded)
        return self._masks[excluded]

    def _suffix(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self._suffixes:
            self._suffixes[ids] = to_device(ids, self.device, torch.int64)
        return self._suffixes[ids]

    def _rope_table(self, positions: int) -> RopeTable:
        if self._rope is None or len(self._rope[0]) < positions:
            self._rope = self.text.rope_table(capacity_bucket(positions))
        return self._rope

    def _weights_identity(self, layers: Seq[DecoderLayerWeights]) -> int:
        """Changes when a parameter that the loop reads moves."""
        held = [getattr(w, f.name) for w in layers for f in fields(w)]
        held += [self.text.embed_tokens.weight, self.text.norm.weight]
        held += [] if self.adapter is None else list(self.adapter.parameters())
        return hash(tuple(0 if p is None else p.data_ptr() for p in held))

    def _reads_unused(self, layer: DecoderLayerWeights, queries: int) -> bool:
        """Whether the decode reads (and masks) what lies behind a row, as PyTorch's does."""
        shape = self.text.shape
        hidden = layer.input_norm.new_empty(1, queries, layer.input_norm.shape[0])
        cache = hidden.new_empty(1, shape.num_kv_heads, 1, shape.head_dim)
        weights = [getattr(layer, f.name) for f in fields(layer)]
        return select("decode", hidden, cache, cache, *weights) is not Backend.TRITON

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
        packed = torch.cat(ids)
        embeds = F.embedding(
            packed.to(self.device, non_blocking=True), self.text.embed_tokens.weight
        )
        if visuals:
            # Places are found on the host, where the ids are: a mask on the device would wait.
            pads = (self.config.image_token_id, self.config.video_token_id)
            places = np.flatnonzero(np.isin(packed.numpy(), pads))
            where = torch.from_numpy(places).to(self.device, non_blocking=True)
            embeds[where] = self._visual_tokens(visuals)
        at = torch.cat(positions, dim=1).to(self.device, non_blocking=True)
        return self.text.prefill(embeds, at, spans, cache, wanted)

    def _visual_tokens(self, visuals: Seq[Visual]) -> torch.Tensor:
        """Visual tokens in order, in calls of limited size: the tower's activations are wide."""
        limit = VISION_PATCHES.get(self.device.type, VISION_PATCHES["cpu"])
        tokens, group, size = [], list[Visual](), 0
        for number, visual in enumerate(visuals):
            group.append(visual)
            size += visual.patches.shape[0]
            following = visuals[number + 1] if number + 1 < len(visuals) else None
            if following is None or size + following.patches.shape[0] > limit:
                patches = torch.cat([self._patches(v) for v in group])
                tokens.append(self.visual(patches, [v.grid for v in group]))
                group, size = [], 0
        return torch.cat(tokens)

    def _patches(self, visual: Visual) -> torch.Tensor:
        return visual.patches.to(self.device, self.dtype, non_blocking=True)


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
