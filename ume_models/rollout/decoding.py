"""Rows that decode side by side in the slots of the arena, come in and leave one by one.

A row that ends makes room: the last row moves into its slot, and one that waits is prefilled behind
the others, so a batch never waits for its longest row. The host looks at the tokens after every
step on a CPU, after every few on a GPU, where the steps between are one recording.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ume_models.backbone.packed_attention import to_device
from ume_models.rollout.buckets import batch_bucket
from ume_models.rollout.engine import Prefilled
from ume_models.rollout.sampling import arg_max, draws, sample
from ume_models.rollout.token_loop import NOTHING, PER_ROW, TokenLoop

if TYPE_CHECKING:
    from ume_models.rollout.tokens import Token

STEPS = 8
"""Steps of a recording: of those, a row that ends wastes half."""


class Decoding:
    """One batch of a ``Token`` policy.

    Args:
        policy: when rows end and what is read.
        rows: the first of them are prefilled, one in each slot; the others wait.
    """

    def __init__(self, policy: Token, rows: Prefilled) -> None:
        self._policy = policy
        self._rows = rows
        self._engine = rows.engine
        self._cache = rows.cache
        device = self._engine.device
        self._stops = to_device((policy.token, *policy.stops), device, torch.int64)
        if policy.tap != "before":
            self._stops = self._stops[1:]
        looks = policy.strings or policy.repeats or not policy.sampling.plain
        self._steps = STEPS if self._engine.graphs.enabled and not looks else 1
        self._waiting = deque(range(len(rows.lengths), len(rows.prompts)))
        self._written: list[list[int]] = [[] for _ in rows.prompts]
        # What leads from a token's place behind each prompt to its position.
        self._offsets = [int(p.positions.max()) + 1 - len(p) for p in rows.prompts]
        self._hidden: list[torch.Tensor | None] = [None] * len(rows.prompts)
        # Of the rows that decode, in the order of their slots: which they are, and their state.
        self._here: list[int] = []
        self._state: dict[str, torch.Tensor] = {}

    def run(self) -> tuple[torch.Tensor, list[list[int]]]:
        """States ``[N, D]`` that become embeddings, and the tokens of each row."""
        self._enter(range(len(self._rows.lengths)), self._rows.states[0])
        while self._here or self._waiting:
            free = self._policy.slots - len(self._here)
            if self._waiting and free:
                entering = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
                longest = max(len(self._rows.prompts[row]) for row in entering)
                self._make_room(longest)
                slot = len(self._here)
                self._enter(entering, self._rows.prefill(entering, self._cache, slot))
            else:
                self._advance()
        return torch.stack([h for h in self._hidden if h is not None]), self._written

    # -- rows come --------------------------------------------------------------------------

    def _enter(self, rows: Seq[int], hidden: torch.Tensor) -> None:
        """Take prefilled rows in, behind the others, with the first token that each puts out."""
        prompts = [self._rows.prompts[row] for row in rows]
        device, policy = self._engine.device, self._policy
        settled = [policy.settled(prompt) for prompt in prompts]
        lengths = to_device([len(prompt) for prompt in prompts], device, torch.int64)
        state = {
            "last": hidden,
            "marked": hidden,
            "lengths": lengths,
            "offsets": to_device([self._offsets[row] for row in rows], device, torch.int64),
        }
        if not policy.sampling.plain:
            vocabulary = len(policy.head)
            state["uniform"] = torch.stack(
                [draws(prompt, policy.sampling.seed, policy.budget) for prompt in prompts]
            ).to(device)
            state["present"] = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                state["present"][row, torch.from_numpy(prompt.input_ids).to(device)] = True
        state["left"] = torch.full_like(lengths, policy.budget)
        token = torch.zeros_like(lengths) if all(settled) else self._choose(hidden, 0, state)
        ended = torch.isin(token, self._stops) | to_device(settled, device, torch.bool)
        state["token"] = token
        state["left"] = torch.where(ended, 0, policy.budget - 1)
        self._state = {
            name: torch.cat([self._state[name], value]) if self._here else value
            for name, value in state.items()
        }
        for row, first, at_once in zip(rows, token.tolist(), settled, strict=True):
            self._here.append(row)
            if not at_once:
                self._written[row].append(first)
        self._retire()

    def _choose(
        self, hidden: torch.Tensor, step: int, state: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        head, how = self._policy.head, self._policy.sampling
        if how.plain:
            return arg_max(hidden, head)
        # The host looks after every step, so ``left`` tells how many there were.
        done = (self._policy.budget - state["left"]).clamp(max=self._policy.budget - 1)
        uniform = state["uniform"].gather(1, done[:, None])[:, 0]
        token = sample(F.linear(hidden, head), state["present"], how, uniform)
        state["present"].scatter_(1, token[:, None], True)
        return token

    # -- rows go on -------------------------------------------------------------------------

    def _advance(self) -> None:
        bound = max(map(self._length, self._here)) + self._steps
        self._make_room(bound)
        engine, policy, cache = self._engine, self._policy, self._cache
        capacity = cache.shape[4]
        ahead = max(self._offsets[row] for row in self._here)
        rope = engine.rope_table(capacity + max(ahead, 0))
        marker = NOTHING if policy.tap == "before" else policy.token
        loop = TokenLoop(
            engine.text, self._rows.layers, rope, self._choose, self._stops, marker, self._steps
        )
        rows, width = len(self._here), policy.head.shape[1]
        found: tuple[torch.Tensor, ...] | None = None
        if engine.graphs.enabled and policy.sampling.plain:
            bucket = batch_bucket(rows)
            wide, whole = torch.int64, engine.dtype
            found = engine.graphs.run(
                key=(
                    "tokens", bucket, cache.shape, len(rope[0]), self._steps, policy.stops,
                    policy.token, marker,
                ),
                identity=(
                    engine.arena.address,
                    engine.weights_identity(self._rows.layers, [policy.head]),
                ),
                inputs={name: self._state[name] for name in PER_ROW},
                rows=bucket,
                shapes=[(bucket, width)] * 2 + [(bucket,)] * 3 + [(bucket, self._steps)],
                body=lambda static: loop.run(static, cache, capacity),
                keep=(rope, self._stops, policy.head),
                dtypes=[whole] * 2 + [wide] * 4,
            )
        if found is None:
            found = loop.run(self._state, cache, bound)
        *state, written = (value[:rows] for value in found)
        self._state.update(zip(("last", "marked", "token", "lengths", "left"), state, strict=True))
        for row, tokens in zip(self._here, written.tolist(), strict=True):
            self._written[row] += [token for token in tokens if token != NOTHING]
        self._retire()

    def _length(self, row: int) -> int:
        """Tokens that a row has cached: all but the one that it put out last."""
        return len(self._rows.prompts[row]) + max(len(self._written[row]) - 1, 0)

    def _make_room(self, length: int) -> None:
        """A cache that holds rows of ``length`` tokens, and what closes one."""
        length += len(self._policy.closing) + 1
        if length > self._cache.shape[4]:
            self._cache = self._engine.arena.grow(self._cache, length)

    # -- rows leave -------------------------------------------------------------------------

    def _retire(self) -> None:
        """Let rows that have ended leave; those behind them move up."""
        left = self._state["left"].tolist()
        ended = [
            not more or self._policy.ends(self._written[row])
            for row, more in zip(self._here, left, strict=True)
        ]
        if not any(ended):
            return
        for slot, row in enumerate(self._here):
            if ended[slot]:
                self._hidden[row] = self._embedding(slot, row)
        stay = [slot for slot, over in enumerate(ended) if not over]
        moving = [slot for slot in stay if slot >= len(stay)]
        order = [slot if not ended[slot] else moving.pop() for slot in range(len(stay))]
        for slot, source in enumerate(order):
            if slot != source:
                length = self._length(self._here[source])
                self._cache[:, :, slot, :, :length] = self._cache[:, :, source, :, :length]
        self._here = [self._here[slot] for slot in order]
        kept = to_device(order, self._engine.device, torch.int64)
        self._state = {name: value[kept] for name, value in self._state.items()}

    def _embedding(self, slot: int, row: int) -> torch.Tensor:
        """The state ``[D]`` that is read of a row that has ended."""
        policy, written = self._policy, self._written[row]
        last = self._state["last"][slot].clone()
        if policy.tap == "before":
            return last
        if policy.token not in written:
            return self._feed(slot, row, policy.closing) if policy.closing else last
        if written[-1] != policy.token:
            return self._state["marked"][slot].clone()
        return self._feed(slot, row, ()) if policy.tap == "at_token" else last

    def _feed(self, slot: int, row: int, closing: tuple[int, ...]) -> torch.Tensor:
        """The state after the row's last token and ``closing``, in one pass."""
        engine = self._engine
        ids = to_device([self._written[row][-1], *closing], engine.device, torch.int64)
        embeds = F.embedding(ids, engine.text.embed_tokens.weight)[None]
        length, offset = self._length(row), self._offsets[row]
        bound = length + len(ids)
        states = engine.text.decode(
            embeds,
            to_device([length], engine.device, torch.int64),
            self._cache[:, :, slot : slot + 1],
            bound,
            self._rows.layers,
            engine.rope_table(bound + max(offset, 0)),
            to_device([offset], engine.device, torch.int64),
        )
        return states[0, -1]
