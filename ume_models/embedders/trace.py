"""TRACE."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from ume_models.embedders.base import Signs
from ume_models.embedders.plume_prompt import PROFILES
from ume_models.embedders.reasoning import ReasoningEmbedder, ReasoningOptions
from ume_models.processing.template import ChatTurns, Layout, Rendered, check_words
from ume_models.profile import Profile, by_name
from ume_models.rollout.engine import Policy

TOKEN = "<|emb|>"


class TracePrompt:
    """TRACE's prompts, reconstructed from the paper: see ``trace_prompts.json``.

    An item with an instruction is a query, one without a candidate, whose answer is given, so that
    it never reasons.

    Args:
        tokenizer: a transformers tokenizer with a Qwen2-VL chat template.
    """

    tokens: tuple[str, ...] = (TOKEN,)
    blank_image = False

    def __init__(self, tokenizer: Any) -> None:
        self._turns = ChatTurns(tokenizer)
        path = files("ume_models.embedders") / "trace_prompts.json"
        self._prompts = json.loads(path.read_text(encoding="utf-8"))

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """See :class:`ume_models.processing.template.Template`."""
        before, after = self._turns.around(layout)
        kinds = [*dict.fromkeys(layout), *(["text"] if text else [])] or ["text"]
        side = self._prompts["query" if instruction else "candidate"]
        request = side["request"].format(kinds=" and ".join(kinds).upper())
        words = check_words("\n".join(filter(None, (instruction, text))))
        return Rendered(before, f"{request}\n\n{words}", f"{side['rules']}{after}{side['answer']}")


@dataclass(frozen=True)
class TraceOptions(ReasoningOptions):
    """Options of TRACE's embeddings.

    Attributes:
        max_new_tokens: the data have at most 256 tokens of reasoning and 64 of answer, so that
            321 with ``<|emb|>``; the paper prints no number.
    """

    max_new_tokens: int = 321


class TraceForEmbedding(ReasoningEmbedder):
    """TRACE: reasons where a query needs it; the state that predicts ``<|emb|>``.

    The route is the first token: ``<|emb|>`` at once, or a thought before it. Paper: TRACE, arXiv
    2603.02929; there is no official code.
    """

    family = "trace"
    token = TOKEN
    asymmetric = True
    Options = TraceOptions
    options: TraceOptions
    profiles = by_name(Profile("reconstructed", TracePrompt, replace(PROFILES["official"].rules)))

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        return TOKEN in signs.vocabulary

    def policy(self, options: TraceOptions) -> Policy:  # type: ignore[override]
        return self.writing(options, "before")
