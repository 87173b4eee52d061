"""GME."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.embedders.vlm2vec import baseline_words
from ume_models.processing.rules import MediaRules
from ume_models.processing.template import IMAGE_PAD, Layout, Rendered, check_words
from ume_models.profile import Profile, by_name

SYSTEM = "You are a helpful assistant."
LIMIT = 1800


class GmePrompt:
    """GME's own interface: the instruction is the system turn, ``<|endoftext|>`` is the last token.

    Args:
        tokenizer: not needed; the turns are written here, as in the official code.
    """

    tokens: tuple[str, ...] = (
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>",
    )  # fmt: skip
    blank_image = False

    def __init__(self, tokenizer: Any) -> None:
        pass

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        return _turns(layout, check_words(instruction) or SYSTEM, check_words(text))


class GmeVlm2VecPrompt(GmePrompt):
    """What VLM2Vec's evaluation asks GME: the instruction stands in the user turn."""

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        return _turns(layout, SYSTEM, baseline_words(layout, instruction, text))


def _turns(layout: Layout, system: str, words: str) -> Rendered:
    media = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>" * len(layout)
    return Rendered(
        "<|im_start|>system\n",
        f"{system}<|im_end|>\n<|im_start|>user\n{media}{words}",
        "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        LIMIT,
    )


_OFFICIAL = MediaRules(
    stored_limit=False,
    multi_image="refuse",
    clips="refuse",
    extreme="cut",
    min_pixels=256 * 28 * 28,
    max_pixels=1280 * 28 * 28,
)
_VLM2VEC = replace(_OFFICIAL, multi_image="middle", clips="middle", min_pixels=4 * 28 * 28)


class GmeForEmbedding(BackboneEmbedder):
    """GME: the state of ``<|endoftext|>`` behind a chat prompt, on Qwen2-VL.

    Paper: GME, CVPR 2025; official code Alibaba-NLP/gme-Qwen2-VL, whose remote code refuses
    transformers 4.52 and later.
    """

    family = "gme"
    profiles = by_name(
        Profile("official", GmePrompt, _OFFICIAL, forced="<|endoftext|>"),
        Profile("vlm2vec", GmeVlm2VecPrompt, _VLM2VEC, forced="<|endoftext|>"),
    )

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return cls.owns(signs)

    @classmethod
    def owns(cls, signs: Signs) -> bool:
        named = [signs.config.get("auto_map"), signs.config.get("architectures")]
        return re.search(r"(?<![a-z])gme", str(named).lower()) is not None
