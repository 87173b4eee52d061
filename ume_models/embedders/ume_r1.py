"""UME-R1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ume_models.embedders.base import Signs
from ume_models.embedders.plume_prompt import (
    GEN_TOKEN,
    GENERATION_PROMPT,
    PROFILES,
    PlumePrompt,
)
from ume_models.embedders.reasoning import ReasoningEmbedder, ReasoningOptions
from ume_models.errors import OptionError
from ume_models.profile import Profile, Tap, by_name
from ume_models.rollout.engine import Policy
from ume_models.rollout.single_pass import SinglePass

# Three lines, the first two with a blank at their end; PLUME wrote one line of them.
REQUEST = GENERATION_PROMPT.replace(". ", ". \n")
_RULES = PROFILES["official"].rules
CHOICES = {"mode": ("disc", "gen"), "tap": ("official", "at_token")}


class UmeR1Prompt(PlumePrompt):
    """PLUME's prompt with the request of UME-R1's page."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, request=REQUEST)


@dataclass(frozen=True)
class UmeR1Options(ReasoningOptions):
    """Options of UME-R1's embeddings.

    Attributes:
        mode: ``"disc"`` reads the last ``<disc_emb>`` of the prompt; ``"gen"`` writes a thought and
            an answer and reads the last ``<gen_emb>`` of them. The two are not in one space.
        tap: ``"official"`` reads the state that consumes ``<gen_emb>``, but that of the last step
            where the budget ended on it; ``"at_token"`` then takes one step more.
        max_new_tokens: officially 8192.
    """

    max_new_tokens: int = 8192
    mode: Literal["disc", "gen"] = "disc"
    tap: Literal["official", "at_token"] = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise OptionError(f"{name} must be {choices}, got {getattr(self, name)!r}")

    def described(self) -> dict[str, Any]:
        # What a single pass depends on is named by the profile; stores of it stay as they are.
        return {} if self.mode == "disc" else super().described()


class UmeR1ForEmbedding(ReasoningEmbedder):
    """UME-R1 on Qwen2-VL: the state at ``<disc_emb>``, or at the ``<gen_emb>`` that it writes.

    Paper: UME-R1, arXiv 2511.00405; official code XMUDeepLIT/UME-R1.
    """

    family = "ume_r1"
    token = GEN_TOKEN
    Options = UmeR1Options
    options: UmeR1Options
    profiles = by_name(
        Profile("official", UmeR1Prompt, _RULES, Tap("<disc_emb>")),
        # PLUME's copy of the evaluation reads the token behind the marker
        Profile("plume-bundle", PlumePrompt, _RULES, Tap("<disc_emb>", offset=1)),
    )

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return {"<disc_emb>", "<gen_emb>"} <= signs.vocabulary.keys()

    def policy(self, options: UmeR1Options) -> Policy:  # type: ignore[override]
        if options.mode == "disc":
            return SinglePass(self._tapped)
        return self.writing(options, options.tap)
