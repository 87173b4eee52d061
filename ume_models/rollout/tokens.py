"""Reasoning in words as a policy of the engine: decode until the embedding is there.

    t(0) = choose(h(prompt));   h(i) = decoder(embedding(t(i - 1)));   t(i) = choose(h(i))

Positions go on from the prompt's largest (M-RoPE) position, as transformers' generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch

from ume_models.rollout.decoding import Decoding
from ume_models.rollout.engine import Prefilled, Trace
from ume_models.rollout.sampling import GREEDY, Sampling
from ume_models.rollout.sequence import Sequence

TapRule = Literal["before", "official", "at_token"]
Route = Literal["direct", "reason"]

SLOTS = {"cpu": 16, "cuda": 64}
"""Rows that decode at a time: they share each reading of the weights, and each has its cache."""


@dataclass(frozen=True)
class TokenTrace(Trace):
    """What was written on the way to the embeddings.

    Attributes:
        hidden: as in ``Trace``.
        token_ids: tokens of each row, the one that ended it included.
        route: ``"direct"`` where the embedding was there without a word, else ``"reason"``.
        fallback: whether the embedding token never came, so that another state stands in.
    """

    token_ids: list[list[int]]
    route: list[Route]
    fallback: list[bool]


@dataclass(frozen=True)
class Token:
    """The policy of embedders that write before they embed.

    Attributes:
        head: ``[V, D]`` the LM head.
        token: the embedding token.
        tap: the embedding is the state that predicts ``token``, which ends the row
            (``"before"``); or the state that consumes the last one, where ``"official"`` takes the
            last step's if the budget ended on it, and ``"at_token"`` one step more.
        stops: tokens that end a row besides.
        budget: tokens of a row, at least one.
        closing: tokens fed to a row that spent its budget without ``token``; the state of the
            last one is the embedding. Without any it is the last step's.
        sampling: how a token is chosen.
        repeats: end a row, as if its budget were spent, when its last tokens are the same phrase
            so many times over; 0 never looks.
        strings: texts that end a row, looked for in what ``text`` makes of its tokens.
        slots: rows that decode at a time.
    """

    head: torch.Tensor
    token: int
    tap: TapRule
    stops: tuple[int, ...]
    budget: int
    closing: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    repeats: int = 0
    strings: tuple[str, ...] = ()
    text: Callable[[Seq[int]], str] | None = None
    slots: int = SLOTS["cpu"]

    @property
    def reserve(self) -> int:
        """The budget, and what is fed when it is spent."""
        return self.budget + max(len(self.closing), 1)

    @property
    def queries(self) -> int:
        return 1 + len(self.closing)

    def reads(self, prompt: Sequence) -> tuple[int, ...]:
        """The last token, or the one before an embedding token that the prompt ends with."""
        return (len(prompt) - 1 - self.settled(prompt),)

    def settled(self, prompt: Sequence) -> bool:
        """Whether nothing is written, because the prompt ends with the embedding token."""
        return self.tap == "before" and int(prompt.input_ids[-1]) == self.token

    def ends(self, ids: Seq[int]) -> bool:
        """Whether a row ends before its budget for a reason that tokens alone do not show."""
        if self.text is not None:
            text = self.text(ids)
            if any(string in text for string in self.strings):
                return True
        return self.repeats > 1 and repeats(ids, self.repeats)

    def follow(self, rows: Prefilled, trace: bool) -> tuple[torch.Tensor, Trace | None]:
        hidden, written = Decoding(self, rows).run()
        return hidden, self.traced(hidden, written, rows.prompts) if trace else None

    def traced(
        self, hidden: torch.Tensor, written: Seq[list[int]], prompts: Seq[Sequence]
    ) -> TokenTrace:
        """The trace of rows that put out ``written``."""
        settled = [self.settled(prompt) for prompt in prompts]
        direct = [
            at_once or (self.tap == "before" and ids[0] == self.token)
            for ids, at_once in zip(written, settled, strict=True)
        ]
        return TokenTrace(
            hidden.float().cpu(),
            [*written],
            ["direct" if at_once else "reason" for at_once in direct],
            [
                not at_once and self.token not in ids
                for ids, at_once in zip(written, settled, strict=True)
            ],
        )


PHRASE = 32
"""Tokens of the longest phrase whose repetition is looked for."""


def repeats(ids: Seq[int], times: int) -> bool:
    """Whether the last tokens are one phrase, of at most ``PHRASE`` tokens, ``times`` times."""
    for length in range(1, min(PHRASE, len(ids) // times) + 1):
        tail = ids[-length * times :]
        if all(tail[i] == tail[i % length] for i in range(length, len(tail))):
            return True
    return False
