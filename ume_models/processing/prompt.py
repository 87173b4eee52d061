"""The prompts of the official evaluation, rendered through the checkpoint's chat template."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from ume_models.errors import CheckpointError, ItemError

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
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

EMPTY_TEXT = "  "

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


def join_text(instruction: str, text: str) -> str:
    """Instruction, one space, text; either may be empty."""
    if instruction and text:
        return f"{instruction} {text}"
    return instruction or text


def clean_text(text: str) -> str:
    """Remove visual placeholder tokens and surrounding white space, as the reference does.

    Raises:
        ItemError: if a control token that would corrupt the prompt's layout is left.
            ``<disc_emb>`` and ``<gen_emb>`` are allowed: the last one in the prompt counts.
    """
    text = text.replace(VIDEO_PAD, "").replace(IMAGE_PAD, "").strip()
    if "<|" in text:
        for token in CONTROL_TOKENS:
            if token in text:
                raise ItemError(
                    f"the text contains the control token {token}, which would corrupt the "
                    "prompt; remove or escape it"
                )
    return text


class PromptTemplate:
    """Renders user turns; the chat template itself is run once per layout.

    Args:
        tokenizer: a transformers tokenizer with a Qwen2-VL chat template and the PLUME tokens.

    Raises:
        CheckpointError: if the chat template or a token is missing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._halves: dict[Layout, tuple[str, str]] = {}
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in (IMAGE_PAD, VIDEO_PAD, DISC_TOKEN, GEN_TOKEN) if t not in vocabulary]
        if missing:
            raise CheckpointError(
                f"the tokenizer lacks {', '.join(missing)}; use the tokenizer files that belong "
                "to the PLUME checkpoint, not those of its base model"
            )
        self.pad_ids: dict[MediaKind, int] = {
            "image": vocabulary[IMAGE_PAD],
            "video": vocabulary[VIDEO_PAD],
        }

    def render(self, layout: Layout, text: str) -> str:
        """The prompt up to and including the assistant header, without :data:`PREFIX`.

        Args:
            layout: kinds of the visual blocks, all placed before the text.
            text: user text, already through :func:`clean_text`.
        """
        before, after = self._halves.get(layout) or self._render_layout(layout)
        return f"{before}{text}\n{DISC_TOKEN}\n{GENERATION_PROMPT}{after}"

    def header(self, layout: Layout) -> str:
        """Everything before the user's text."""
        return (self._halves.get(layout) or self._render_layout(layout))[0]

    def _render_layout(self, layout: Layout) -> tuple[str, str]:
        content: list[dict[str, str]] = [{"type": kind, kind: ""} for kind in layout]
        content.append({"type": "text", "text": _SENTINEL})
        try:
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
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
        self._halves[layout] = (parts[0], parts[1])
        return self._halves[layout]
