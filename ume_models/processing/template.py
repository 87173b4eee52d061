"""What a prompt template is, and what templates share: the words of an item to a whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from ume_models.errors import CheckpointError, ItemError

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
EMPTY_TEXT = "  "  # official evaluations embed an item without any content as two spaces

# Tokens that would end the user turn or open another vision block from inside the text.
CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)

MediaKind: TypeAlias = Literal["image", "video"]
Layout: TypeAlias = "tuple[MediaKind, ...]"

_SENTINEL = "UMETEXTSENTINEL"
_LAYOUTS: tuple[Layout, ...] = ((), ("image",), ("image", "image"), ("video",))
_PROBES = (("", ""), ("Find it.", "a text"), ("", "a text"), ("Find it.", ""))


@dataclass(frozen=True)
class Rendered:
    """A prompt with one pad per visual block: a constant beginning, a middle, a constant end.

    Attributes:
        head, tail: parts that many prompts share; they are tokenised once per pair.
        text: what differs from item to item.
        limit: most tokens, visual ones included, that the official code takes without cutting the
            prompt; None: any number.
    """

    head: str
    text: str
    tail: str
    limit: int | None = None

    def __str__(self) -> str:
        return f"{self.head}{self.text}{self.tail}"


class Template(Protocol):
    """A convention of prompts.

    Attributes:
        tokens: what the tokenizer must have, beside the visual pads.
        blank_image: texts without media stand behind a constant white image.
    """

    tokens: tuple[str, ...]
    blank_image: bool

    def render(self, layout: Layout, instruction: str, text: str) -> Rendered:
        """The prompt of an item.

        Args:
            layout: kinds of the item's visual blocks in order: its pictures, or its clip (also
                where the rules make a picture of it); empty for a text, and one picture where the
                blank image stands before it.
            instruction: task instruction, may be empty.
            text: may be empty; all three are empty for an item without any content.

        Raises:
            ItemError: the words would corrupt the prompt.
        """


def join_text(instruction: str, text: str) -> str:
    """Instruction, one space, text; either may be empty."""
    if instruction and text:
        return f"{instruction} {text}"
    return instruction or text


def check_words(words: str) -> str:
    """The words themselves.

    Raises:
        ItemError: they contain a control token that would corrupt the prompt's layout. Other
            tokens of a family are allowed: its rules say which one counts.
    """
    if "<|" in words:
        for token in CONTROL_TOKENS:
            if token in words:
                raise ItemError(
                    f"the text contains the control token {token}, which would corrupt the "
                    "prompt; remove or escape it"
                )
    return words


def sample_prompts(template: Template) -> list[list[str]]:
    """Prompts that tell conventions apart: with and without media, instruction and text."""
    return [
        [*map(str, vars(template.render(layout, instruction, text)).values())]
        for layout in _LAYOUTS
        for instruction, text in _PROBES
    ]


class ChatTurns:
    """The tokenizer's own chat template around a user's words; it runs once per layout.

    Args:
        tokenizer: a transformers tokenizer with a Qwen2-VL chat template.
        answer: the assistant's turn, which follows the user's; none if empty.
    """

    def __init__(self, tokenizer: Any, answer: str = "") -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._around: dict[Layout, tuple[str, str]] = {}

    def around(self, layout: Layout) -> tuple[str, str]:
        """What stands before the words of a layout, and what after, up to the generation header.

        Raises:
            CheckpointError: the chat template is missing or another one.
        """
        if layout not in self._around:
            self._around[layout] = self._render(layout)
        return self._around[layout]

    def _render(self, layout: Layout) -> tuple[str, str]:
        content: list[dict[str, str]] = [{"type": kind, kind: ""} for kind in layout]
        content.append({"type": "text", "text": _SENTINEL})
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self._answer:
            answer = [{"type": "text", "text": self._answer}]
            turns.append({"role": "assistant", "content": answer})
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja errors, or none set: transformers raises both kinds
            raise CheckpointError(
                f"the chat template cannot be rendered ({error}); copy chat_template.json from "
                "the Qwen2-VL base model"
            ) from error
        parts = rendered.split(_SENTINEL)
        pads = (IMAGE_PAD, VIDEO_PAD)
        found = tuple(parts[0].count(pad) for pad in pads)
        if len(parts) != 2 or found != (layout.count("image"), layout.count("video")):
            raise CheckpointError(
                "the chat template does not place the visual blocks and the text once each; "
                "copy chat_template.json from the Qwen2-VL base model"
            )
        return parts[0], parts[1]
