"""VLM2Vec-V2, and the words that its evaluation gives to other models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.errors import ItemError
from ume_models.processing.rules import MediaRules
from ume_models.processing.template import (
    EMPTY_TEXT,
    IMAGE_PAD,
    VIDEO_PAD,
    Layout,
    Rendered,
    check_words,
    join_text,
)
from ume_models.profile import Profile, by_name


class Vlm2VecPrompt:
    """Bare visual tokens and words: no turns, and no marks around a picture.

    Words that already hold visual tokens, as those of the published data do, are taken as they
    are. Around others: pictures, line break, words, line break; a clip, a blank, words; a text
    with an instruction ends in a line break.

    Args:
        tokenizer: not needed; templates of other families run its chat template.
    """

    tokens: tuple[str, ...] = ()
    blank_image = False

    def __init__(self, tokenizer: Any) -> None:
        pass

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        words = join_text(instruction, text)
        check_words(words.replace(IMAGE_PAD, "").replace(VIDEO_PAD, ""))
        found = (words.count(IMAGE_PAD), words.count(VIDEO_PAD))
        if any(found):
            _check_pads(found, layout)
            return Rendered("", words, "")
        if layout == ("video",):
            return Rendered(f"{VIDEO_PAD} ", words, "")
        if layout:
            return Rendered(" ".join([IMAGE_PAD] * len(layout)), _lines(words), "")
        return Rendered("", f"{words}\n" if instruction else words or EMPTY_TEXT, "")


def baseline_words(layout: Layout, instruction: str, text: str) -> str:
    """The user's words as VLM2Vec's evaluation hands them to GME and LamRA.

    A text without instruction is taken as it is, but for visual tokens at the head of a line of
    their own. The blank behind an instruction stays where no text follows.

    Raises:
        ItemError: a control token is left.
    """
    words = f"{instruction} {text}" if instruction else text.replace(f"{IMAGE_PAD}\n", "")
    check_words(words)
    if text and not (words or layout):
        raise ItemError("has no text left once visual placeholders are removed")
    if not instruction or layout == ("video",):
        return words or ("" if layout else EMPTY_TEXT)
    return _lines(words) if layout else f"{words}\n"


def _lines(words: str) -> str:
    """Words between line breaks, as the parsers of VLM2Vec's picture tasks write them."""
    return f"\n{words}".replace(" \n", "\n") + "\n"


def _check_pads(found: tuple[int, int], layout: Layout) -> None:
    given = (layout.count("image"), layout.count("video"))
    if found != given:
        raise ItemError(
            f"the text has {found[0]} {IMAGE_PAD} and {found[1]} {VIDEO_PAD} for {given[0]} "
            f"images and {given[1]} videos; write one per image or video, or none at all"
        )


_MAIN = MediaRules(
    stored_limit=False,
    multi_image="all",
    mixed_frames=True,
    tiny_to_square=True,
    extreme="square",
    fetch_min_pixels=None,
    min_pixels=4 * 28 * 28,
    max_pixels=1280 * 28 * 28,
)
_BUNDLE = replace(_MAIN, min_pixels=768, max_pixels=2_359_296)


class Vlm2VecForEmbedding(BackboneEmbedder):
    """VLM2Vec-V2: the state of the last token of a bare prompt, on Qwen2-VL with a merged LoRA.

    Paper: VLM2Vec-V2, TMLR 2026; official code TIGER-AI-Lab/VLM2Vec.
    """

    family = "vlm2vec"
    profiles = by_name(
        Profile("official", Vlm2VecPrompt, _MAIN), Profile("plume-bundle", Vlm2VecPrompt, _BUNDLE)
    )

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return signs.lora and not {"<disc_emb>", "<emb>"} & signs.vocabulary.keys()
