"""The engine of every embedder: packed prefill into a ragged arena, then what a policy wants.

A policy says which states of a prompt it needs and what follows the prefill: nothing
(``SinglePass``), or steps whose inputs it makes itself (``Latent``, ``Token``). Prefill, prompt
headers, arena, rotary tables, recordings and the vision tower are here, once for all of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ume_kernels import Backend, DecoderLayerWeights
from ume_kernels.dispatch import select
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.packed_attention import Span, to_device
from ume_models.backbone.text import RopeTable, TextModel
from ume_models.backbone.vision import VisionModel
from ume_models.errors import CapacityError
from ume_models.rollout.arena import KVArena
from ume_models.rollout.buckets import capacity_bucket
from ume_models.rollout.graphs import GraphPool
from ume_models.rollout.headers import Header, Headers
from ume_models.rollout.sequence import Sequence, Visual, beginning

# Patches per call of the vision tower. A thousand rows keep a CPU's matrix units busy; a GPU
# wants more. One larger image goes alone.
VISION_PATCHES = {"cpu": 2048, "cuda": 65536}

GROWS_BY = 256
"""Tokens beyond the prompts that the arena holds before a policy has to let it grow."""


@dataclass(frozen=True)
class Trace:
    """States of a batch that are not its embeddings, float32 on the CPU.

    Attributes:
        hidden: ``[B, D]`` the states that were normalised into the embeddings.
    """

    hidden: torch.Tensor


class Policy(Protocol):
    """What follows the prefill of a batch.

    Attributes:
        reserve: tokens that a row grows by, at most.
        queries: new tokens per row of its widest decoder pass; 0 if there is none.
        slots: rows in the arena at a time, of which it lets others in as some leave; None for all.
    """

    @property
    def reserve(self) -> int: ...

    @property
    def queries(self) -> int: ...

    @property
    def slots(self) -> int | None: ...

    def reads(self, prompt: Sequence) -> tuple[int, ...]:
        """Indices of the prompt's tokens whose states it needs, in its own order.

        Every prompt of a batch has the same number of them.
        """

    def follow(self, rows: Prefilled, trace: bool) -> tuple[torch.Tensor, Trace | None]:
        """States ``[B, D]`` after the final norm, of which the embeddings are made."""


Prefill = Callable[[Seq[int], torch.Tensor, int], torch.Tensor]


def _nothing_waits(*_: object) -> torch.Tensor:
    raise AssertionError("every prompt is in the arena")


@dataclass(frozen=True)
class Prefilled:
    """A batch in the arena, handed to its policy.

    Attributes:
        engine: decoder, recordings, rotary tables.
        layers: the decoder's parameters as the kernels take them.
        lengths: prompt tokens of each row; row r lies in slot r of the cache.
        cache: ``[layers, 2, slots, Hkv, capacity, dh]``.
        states: for each of the policy's ``reads`` the states ``[B, D]`` after the final norm.
        prompts: those of the whole batch; the first are these rows.
        prefill: ``(which prompts, cache, first slot)`` to their states, as ``states[0]``.
    """

    engine: Engine
    layers: Seq[DecoderLayerWeights]
    lengths: Seq[int]
    cache: torch.Tensor
    states: tuple[torch.Tensor, ...]
    prompts: Seq[Sequence] = ()
    prefill: Prefill = _nothing_waits


class Engine:
    """Runs batches of unpadded prompts through a backbone.

    Args:
        config, text, visual: the backbone.
        graphs: recordings of what follows the prefill; the default records CUDA graphs where
            there is a CUDA device.
    """

    def __init__(
        self,
        config: BackboneConfig,
        text: TextModel,
        visual: VisionModel,
        graphs: GraphPool | None = None,
    ) -> None:
        self.config = config
        self.text = text
        self.visual = visual
        weight = text.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs = GraphPool.for_device(self.device) if graphs is None else graphs
        bucketed = self.graphs.enabled or self.device.type == "cuda"
        self.arena = KVArena(config, self.dtype, self.device, bucketed, self.graphs.clear)
        # One arena serves one batch at a time; calls from other threads wait.
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._rope: RopeTable | None = None

    def run(
        self, batch: Seq[Sequence], policy: Policy, trace: bool = False
    ) -> tuple[torch.Tensor, Trace | None]:
        """States ``[B, D]`` of a batch after the final norm, and the trace if asked for.

        Raises:
            CapacityError: a prompt and what follows it exceed the model's positions.
        """
        with self._exclusive():
            self._check_capacity(max(map(len, batch)), policy.reserve)
            reads = [policy.reads(sequence) for sequence in batch]
            if not policy.reserve:  # attention is causal: what stands behind is never read
                batch = [self._until(s, max(at)) for s, at in zip(batch, reads, strict=True)]
            slots = len(batch) if policy.slots is None else min(policy.slots, len(batch))
            room = policy.reserve if policy.slots is None else min(policy.reserve, GROWS_BY)
            lengths = [len(sequence) for sequence in batch[:slots]]
            headers = self._headers(batch, [min(tokens) for tokens in reads])
            layers = self.text.layer_weights()
            finite = self._reads_unused(layers[0], max(policy.queries, 1))
            cache = self.arena.begin(lengths, room, finite)
            states = self._states(batch[:slots], headers[:slots], cache, reads[:slots])

            def prefill(rows: Seq[int], cache: torch.Tensor, slot: int) -> torch.Tensor:
                prompts, at = [batch[row] for row in rows], [reads[row] for row in rows]
                return self._prefill(prompts, [headers[row] for row in rows], cache, at, slot)

            here = Prefilled(self, layers, lengths, cache, states, batch, prefill)
            return policy.follow(here, trace)

    def _until(self, sequence: Sequence, token: int) -> Sequence:
        """The prompt up to a token, or all of it where the token lies inside of a visual."""
        cut = beginning(sequence, token + 1, self.config)
        return cut if len(cut) > token else sequence

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

    def rope_table(self, positions: int) -> RopeTable:
        """Rotary tables that reach at least ``positions``; made once, they hold no weights."""
        if self._rope is None or len(self._rope[0]) < positions:
            self._rope = self.text.rope_table(capacity_bucket(positions))
        return self._rope

    def weights_identity(
        self, layers: Seq[DecoderLayerWeights], others: Seq[torch.Tensor] = ()
    ) -> int:
        """Changes when a parameter that the decoder reads, or one of ``others``, moves."""
        held = [getattr(w, f.name) for w in layers for f in fields(w)]
        held += [self.text.embed_tokens.weight, self.text.norm.weight, *others]
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
                "shorten the text, lower max_pixels or let fewer tokens follow"
            )

    def _headers(self, batch: Seq[Sequence], reach: Seq[int]) -> list[Header | None]:
        """For each sequence the header that it begins with, if one is shared."""
        shared = Headers(self.config, batch, reach)
        pairs = zip(batch, reach, strict=True)
        return [shared.match(prompt, token, self._header_kv) for prompt, token in pairs]

    def _header_kv(self, sequence: Sequence) -> torch.Tensor:
        arena = KVArena(self.config, self.dtype, self.device)
        cache = arena.begin([len(sequence)], 0)
        self._prefill([sequence], [None], cache, [[len(sequence) - 1]])
        return cache[:, :, 0, :, : len(sequence)].clone()

    def _states(
        self,
        batch: Seq[Sequence],
        headers: Seq[Header | None],
        cache: torch.Tensor,
        reads: Seq[tuple[int, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """Prefill, and the states of the tokens that are read: one ``[B, D]`` for each of them."""
        if len(reads[0]) == 1:
            return (self._prefill(batch, headers, cache, reads),)
        # The prefill returns each token once, in ascending order, row after row.
        wanted = [sorted(set(tokens)) for tokens in reads]
        picks: list[list[int]] = []
        at = 0
        for tokens, kept in zip(reads, wanted, strict=True):
            picks.append([at + kept.index(token) for token in tokens])
            at += len(kept)
        chosen = to_device(list(zip(*picks, strict=True)), self.device, torch.int64)
        states = self._prefill(batch, headers, cache, wanted)
        return tuple(states[rows] for rows in chosen)

    def _prefill(
        self,
        batch: Seq[Sequence],
        headers: Seq[Header | None],
        cache: torch.Tensor,
        read: Seq[Seq[int]],
        first_slot: int = 0,
    ) -> torch.Tensor:
        """Pack, embed, insert visual tokens and prefill; states at ``read``, row after row."""
        spans: list[Span] = []
        ids: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        wanted: list[int] = []
        visuals: list[Visual] = []
        start = 0
        for row, (sequence, header) in enumerate(zip(batch, headers, strict=True)):
            slot, cached = first_slot + row, 0
            if header is not None and header.kv is not None:
                cached = len(header.sequence)
                cache[:, :, slot, :, :cached] = header.kv
            skipped = 0 if header is None else len(header.sequence.visuals)
            visuals.extend(sequence.visuals[skipped:])
            spans.append(Span(slot, cached, start, len(sequence) - cached))
            ids.append(torch.from_numpy(sequence.input_ids[cached:]))
            positions.append(torch.from_numpy(sequence.positions[:, cached:]))
            wanted.extend(start + token - cached for token in read[row])
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


def unit_norm(hidden: torch.Tensor) -> torch.Tensor:
    """L2-normalised float32 rows (the official norm runs in float32 under autocast).

    Raises:
        FloatingPointError: a row is not finite, which means an overflow in the model.
    """
    out = F.normalize(hidden.float(), p=2, dim=-1)
    if not math.isfinite(float(out.sum())):
        raise FloatingPointError("an embedding is not finite; run the model in float32 or bfloat16")
    return out
