"""PLUME's prompts and pixels as data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ume_models.processing.rules import MediaRules
from ume_models.processing.template import (
    EMPTY_TEXT,
    IMAGE_PAD,
    VIDEO_PAD,
    ChatTurns,
    Layout,
    Rendered,
    check_words,
    join_text,
)
from ume_models.profile import BEFORE_PROFILES, Profile, by_name

GENERATION_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as "
    "embeddings. First output the thinking process in <think> </think> tags and then summarize "
    "the entire input in a word or sentence. Finally, use the <gen_emb> tag to represent the "
    "entire input."
)
PREFIX = "<think><bot>"
SUFFIX = "<eot></think>\n<gen_emb>"
DISC_TOKEN = "<disc_emb>"
GEN_TOKEN = "<gen_emb>"


def clean_text(text: str) -> str:
    """Remove visual placeholder tokens and surrounding white space, as the reference does.

    Raises:
        ItemError: if a control token that would corrupt the prompt's layout is left.
            ``<disc_emb>`` and ``<gen_emb>`` are allowed: the last one in the prompt counts.
    """
    return check_words(text.replace(VIDEO_PAD, "").replace(IMAGE_PAD, "").strip())


class PlumePrompt:
    """The user turn of the official evaluation, up to and including the assistant header.

    Args:
        tokenizer: a transformers tokenizer with a Qwen2-VL chat template.
        request: what the model is asked to do, behind ``<disc_emb>``.
        blank_image: texts without media stand behind a white image, as in the evaluation.
    """

    tokens: tuple[str, ...] = (DISC_TOKEN, GEN_TOKEN)

    def __init__(
        self, tokenizer: Any, request: str = GENERATION_PROMPT, blank_image: bool = True
    ) -> None:
        self.blank_image = blank_image
        self._turns = ChatTurns(tokenizer)
        self._request = f"\n{DISC_TOKEN}\n{request}"

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        before, after = self._turns.around(layout)
        words = clean_text(join_text(instruction, text))
        if not (layout or instruction or text):
            words = EMPTY_TEXT
        return Rendered(before, words, f"{self._request}{after}")


# The bundled image processor makes squares of extreme proportions that the first resize lets pass.
_BUNDLE = MediaRules(transparency="white", extreme="square", stored_limit=False)
PROFILES = by_name(
    # qwen-vl-utils 0.0.14 is what the official installation gives
    Profile("official", PlumePrompt, replace(_BUNDLE, clips="together")),
    Profile("official-qwen-vl-utils-0.0.11", PlumePrompt, _BUNDLE),
    Profile(BEFORE_PROFILES, PlumePrompt, MediaRules()),
)
