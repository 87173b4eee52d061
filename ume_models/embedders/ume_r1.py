"""UME-R1's discriminative embedding."""

from __future__ import annotations

from typing import Any

from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.embedders.plume_prompt import GENERATION_PROMPT, PROFILES, PlumePrompt
from ume_models.profile import Profile, Tap, by_name

# Three lines, the first two with a blank at their end; PLUME wrote one line of them.
REQUEST = GENERATION_PROMPT.replace(". ", ". \n")
_RULES = PROFILES["official"].rules


class UmeR1Prompt(PlumePrompt):
    """PLUME's prompt with the request of UME-R1's page."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, request=REQUEST)


class UmeR1ForEmbedding(BackboneEmbedder):
    """UME-R1, discriminative: the state at the last ``<disc_emb>``, on Qwen2-VL.

    Paper: UME-R1, arXiv 2511.00405; official code XMUDeepLIT/UME-R1.
    """

    family = "ume_r1"
    profiles = by_name(
        Profile("official", UmeR1Prompt, _RULES, Tap("<disc_emb>")),
        # PLUME's copy of the evaluation reads the token behind the marker
        Profile("plume-bundle", PlumePrompt, _RULES, Tap("<disc_emb>", offset=1)),
    )

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return {"<disc_emb>", "<gen_emb>"} <= signs.vocabulary.keys()
