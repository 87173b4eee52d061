"""Prompt text to token ids, in batches, without tokenising the constant parts again and again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ume_models.processing.prompt import DISC_TOKEN, Layout, PromptTemplate

IdArray: TypeAlias = "npt.NDArray[np.int32]"
Prompt: TypeAlias = "tuple[Layout, str]"

_CHUNK = 4096
# Texts that would expose a tokenizer in which neighbours of an added token influence each other.
_PROBES = ("a", " a", "a ", "\n\n", "\u0301e", "9", "a\n<disc_emb>\nb", "<", "▁x", "")


class PromptTokenizer:
    """Tokenises rendered prompts; the ids are those of the whole rendered string.

    Tokenizers cut a string at added tokens before anything else, so the parts on either side of
    one are independent. The part before the user's text and the part from ``<disc_emb>`` on are
    constant per layout and tokenised once. Whether the tokenizer at hand behaves so is tried per
    layout on a few probes; if not, whole prompts are tokenised.

    Args:
        tokenizer: a transformers tokenizer.
        template: renders the prompts.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._frames: dict[Layout, _Frame | None] = {}

    def encode(self, prompts: Iterable[Prompt]) -> dict[Prompt, IdArray]:
        """int32 ids of each distinct prompt, with one pad per visual block."""
        ordered = list(dict.fromkeys(prompts))
        result: dict[Prompt, IdArray] = {}
        for start in range(0, len(ordered), _CHUNK):
            chunk = ordered[start : start + _CHUNK]
            frames = [self._frame(layout) for layout, _ in chunk]
            variable = [
                self._template.render(layout, text) if frame is None else frame.middle(text)
                for (layout, text), frame in zip(chunk, frames, strict=True)
            ]
            # Special tokens of the tokenizer's own template belong to whole prompts only.
            whole = [i for i, frame in enumerate(frames) if frame is None]
            parts = [i for i, frame in enumerate(frames) if frame is not None]
            for indices, add_special in ((whole, True), (parts, False)):
                ids = self._ids([variable[i] for i in indices], add_special)
                for i, middle in zip(indices, ids, strict=True):
                    frame = frames[i]
                    result[chunk[i]] = (
                        np.array(middle, dtype=np.int32)
                        if frame is None
                        else np.concatenate(
                            (frame.head, np.array(middle, dtype=np.int32), frame.tail)
                        )
                    )
        return result

    def _frame(self, layout: Layout) -> _Frame | None:
        if layout not in self._frames:
            self._frames[layout] = self._make_frame(layout)
        return self._frames[layout]

    def _make_frame(self, layout: Layout) -> _Frame | None:
        rendered = self._template.render(layout, "")
        before = self._template.header(layout)
        cut = max((before.rfind(t) + len(t) for t in self._added if t in before), default=0)
        tail = rendered[len(before) + 1 :]
        if not tail.startswith(DISC_TOKEN):
            return None
        head_ids, tail_ids = self._ids([before[:cut], tail], False)
        frame = _Frame(
            np.array(head_ids, dtype=np.int32), before[cut:], np.array(tail_ids, dtype=np.int32)
        )
        whole = self._ids([self._template.render(layout, probe) for probe in _PROBES], True)
        parts = self._ids([frame.middle(probe) for probe in _PROBES], False)
        same = all(w == head_ids + p + tail_ids for w, p in zip(whole, parts, strict=True))
        return frame if same else None

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return ids


@dataclass(frozen=True)
class _Frame:
    """Ids before and after the variable part of a layout, and that part's constant beginning."""

    head: IdArray
    lead: str
    tail: IdArray

    def middle(self, text: str) -> str:
        return f"{self.lead}{text}\n"
