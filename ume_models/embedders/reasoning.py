"""What families that write before they embed have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ume_models.backbone.tokenizer import end_tokens
from ume_models.embedder import EmbedOptions
from ume_models.embedders.base import BackboneEmbedder
from ume_models.errors import OptionError
from ume_models.rollout.sampling import Sampling
from ume_models.rollout.tokens import SLOTS, TapRule, Token

CLOSING = "</think><answer>{token}"


@dataclass(frozen=True)
class ReasoningOptions(EmbedOptions):
    """How a row is written.

    Attributes:
        max_new_tokens: of a row; the state of the last one stands in where the embedding token
            never came.
        close: instead, end a thought that spent its budget with ``</think><answer>`` and the
            embedding token.
        temperature, sample_top_k, top_p, repetition_penalty, seed: see
            :class:`ume_models.rollout.sampling.Sampling`; the default is the arg-max.
        max_repeats: end a row, as if its budget were spent, when its last words are one phrase so
            many times over; 0 never.
    """

    max_new_tokens: int = 1
    close: bool = False
    temperature: float = 0.0
    sample_top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_repeats: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1), ("sample_top_k", 0), ("seed", 0), ("max_repeats", 0)
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or value < least:
                raise OptionError(f"{name} must be a whole number ≥ {least}, got {value!r}")
            object.__setattr__(self, name, int(value))
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature must be a number ≥ 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise OptionError(
                f"repetition_penalty must be a number > 0, got {self.repetition_penalty!r}"
            )

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen."""
        return Sampling(
            self.temperature, self.sample_top_k, self.top_p, self.repetition_penalty, self.seed
        )


class ReasoningEmbedder(BackboneEmbedder):
    """Writes until the embedding token is there.

    Class attributes of a family:
        token: the embedding token.
    """

    token: str

    def attach(self, *args: Any, **kwargs: Any) -> None:
        super().attach(*args, **kwargs)
        self._token = self.tokenizer.convert_tokens_to_ids(self.token)
        self._closing = self.token_ids(CLOSING.format(token=self.token))
        self._stops = tuple(sorted(end_tokens(self.tokenizer, self.sources)))

    def writes(self, options: EmbedOptions) -> bool:
        return isinstance(self.policy(options), Token)

    def writing(self, options: ReasoningOptions, tap: TapRule) -> Token:
        """The policy of these options."""
        head: torch.Tensor = (self.lm_head or self.model.embed_tokens).weight
        return Token(
            head,
            self._token,
            tap,
            self._stops,
            options.max_new_tokens,
            self._closing if options.close else (),
            options.sampling,
            options.max_repeats,
            slots=SLOTS.get(self.device.type, SLOTS["cpu"]),
        )
