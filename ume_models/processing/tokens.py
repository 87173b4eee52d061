"""Prompt text to token ids, in batches, without tokenising the constant parts again and again."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ume_models.processing.template import Rendered

IdArray: TypeAlias = "npt.NDArray[np.int32]"

_CHUNK = 4096
_COMPOSED = 4  # characters, at most, of which normalisation (NFC) makes one
# Texts that would expose a tokenizer in which neighbours of an added token influence each other.
_PROBES = ("a", " a", "a ", "\n\n", "\u0301e", "9", "<", "▁x", "")


class PromptTokenizer:
    """Tokenises rendered prompts; the ids are those of the whole rendered string.

    Tokenizers cut a string at added tokens before anything else, so the parts on either side of
    one are independent. What stands up to the last one in the constant beginning of a prompt, and
    from the first one on in its end, is tokenised once. Whether the tokenizer at hand behaves so
    is tried on a few probes for each pair of beginning and end; if not, whole prompts are
    tokenised.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._probes = [*_PROBES, *(f"a\n{token}\nb" for token in self._added[:1])]
        self._frames: dict[tuple[str, str], _Frame | None] = {}
        self._longest = max(map(len, tokenizer.get_vocab()))

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether the number of characters alone says that there are more than ``limit`` tokens.

        Where it does not, there may be more all the same. Tokenizers hold hundreds of bytes per
        character, so what cannot fit must not reach them.
        """
        most = limit * self._longest
        if len(text) <= most or text.isascii():
            return len(text) > most
        return len(unicodedata.normalize("NFC", text[: _COMPOSED * (most + 1)])) > most

    def encode(self, prompts: Iterable[Rendered]) -> dict[Rendered, IdArray]:
        """int32 ids of each distinct prompt, with one pad per visual block."""
        ordered = list(dict.fromkeys(prompts))
        result: dict[Rendered, IdArray] = {}
        for start in range(0, len(ordered), _CHUNK):
            chunk = ordered[start : start + _CHUNK]
            frames = [self._frame(prompt.head, prompt.tail) for prompt in chunk]
            variable = [
                str(prompt) if frame is None else frame.middle(prompt.text)
                for prompt, frame in zip(chunk, frames, strict=True)
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

    def _frame(self, head: str, tail: str) -> _Frame | None:
        if (head, tail) not in self._frames:
            self._frames[head, tail] = self._make_frame(head, tail)
        return self._frames[head, tail]

    def _make_frame(self, head: str, tail: str) -> _Frame | None:
        end = max((head.rfind(t) + len(t) for t in self._added if t in head), default=0)
        begin = min((tail.find(t) for t in self._added if t in tail), default=len(tail))
        head_ids, tail_ids = self._ids([head[:end], tail[begin:]], False)
        frame = _Frame(
            np.array(head_ids, dtype=np.int32),
            head[end:],
            tail[:begin],
            np.array(tail_ids, dtype=np.int32),
        )
        whole = self._ids([f"{head}{probe}{tail}" for probe in self._probes], True)
        parts = self._ids([frame.middle(probe) for probe in self._probes], False)
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
    """Ids before and after the variable part of a prompt, and that part's constant ends."""

    head: IdArray
    lead: str
    trail: str
    tail: IdArray

    def middle(self, text: str) -> str:
        return f"{self.lead}{text}{self.trail}"
