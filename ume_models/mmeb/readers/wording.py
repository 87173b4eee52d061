"""How instruction and text become one string.

The official evaluation puts a placeholder and a space in front where there is media. It removes the
placeholder again before a chat template is applied, so here it is left out from the start.
"""

from __future__ import annotations

_V1_PLACEHOLDER = "<|image_1|>"


def instruct(instruction: str, text: str = "") -> str:
    """Instruction, a space and the text; the instruction alone where there is no text."""
    return f"{instruction} {text}" if text else instruction


def has_placeholder(text: str) -> bool:
    """Whether a text of MMEB-V1 has a place for an image."""
    return _V1_PLACEHOLDER in text


def without_placeholder(text: str) -> str:
    """An instruction of MMEB-V1 without the place of its image."""
    return text.replace(_V1_PLACEHOLDER, "")


def as_in_v1(text: str) -> str:
    """Spaces in front of line breaks left out, as the first version of the benchmark had them."""
    return text.replace(" \n", "\n")
