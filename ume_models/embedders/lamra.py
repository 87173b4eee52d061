"""LamRA."""

from __future__ import annotations

from typing import Any

from ume_models.embedders.base import BackboneEmbedder, Signs
from ume_models.embedders.vlm2vec import baseline_words
from ume_models.processing.rules import MediaRules
from ume_models.processing.template import (
    ChatTurns,
    Layout,
    Rendered,
    check_words,
    join_text,
)
from ume_models.profile import Profile, Tap, by_name

CANDIDATE_LIMIT = 1024


class LamraPrompt:
    """LamRA's own evaluation: ``Summarize above … in one word:``, answered by ``<emb>.``.

    Words beside a picture, or alone, are made sentences, as for M-BEIR; those beside a clip are
    taken as they are, as for MSR-VTT. An item without instruction is a candidate.

    Args:
        tokenizer: a transformers tokenizer with a Qwen2-VL chat template.
    """

    tokens: tuple[str, ...] = ("<emb>",)
    blank_image = False

    def __init__(self, tokenizer: Any) -> None:
        self._turns = ChatTurns(tokenizer, answer="<emb>.")

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        clip = layout == ("video",)
        if clip:
            words = join_text(instruction, text)
        else:
            words = _sentence(f"{_sentence(instruction)} {text}" if instruction else text)
        above = [*layout[:1], "sentence"] if words or not layout else layout[:1]
        before, after = self._turns.around(layout)
        return Rendered(
            before,
            check_words(words),
            f"\nSummarize above {' and '.join(above)} in one word: {after}",
            None if clip or instruction else CANDIDATE_LIMIT,
        )


class LamraVlm2VecPrompt(LamraPrompt):
    """What VLM2Vec's evaluation asks LamRA: no request to summarise, one picture at most."""

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        words = baseline_words(layout, instruction, text)
        before, after = self._turns.around(("image",) if layout else ())
        return Rendered(before, words if layout else f"{words}\n", after)


def _sentence(words: str) -> str:
    """A capital first letter, and a full stop unless one of ``.?!`` ends the words."""
    words = words.replace("\r", "").strip().strip('"')
    if not words:
        return ""
    return f"{words[0].upper()}{words[1:]}{'' if words[-1] in '.?!' else '.'}"


_OFFICIAL = MediaRules(
    stored_limit=False,
    multi_image="refuse",
    mixed_frames=True,
    fetch_max_pixels=300 * 28 * 28,
    min_pixels=4 * 28 * 28,
    max_pixels=16384 * 28 * 28,
)
_VLM2VEC = MediaRules(
    stored_limit=False,
    multi_image="middle",
    clips="middle",
    extreme="cut",
    min_pixels=256 * 28 * 28,
    max_pixels=1280 * 28 * 28,
)
_ANSWER = "<emb>.<|im_end|>\n<|im_start|>assistant\n"


class LamraForEmbedding(BackboneEmbedder):
    """LamRA: the state before the first ``<emb>``, on Qwen2-VL or Qwen2.5-VL.

    Paper: LamRA, CVPR 2025; official code Code-kunkun/LamRA.
    """

    family = "lamra"
    profiles = by_name(
        Profile("official", LamraPrompt, _OFFICIAL, Tap("<emb>", "first", -1), _ANSWER),
        Profile("vlm2vec", LamraVlm2VecPrompt, _VLM2VEC, forced=_ANSWER),
    )

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return "<emb>" in signs.vocabulary
