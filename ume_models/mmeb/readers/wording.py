"""How instruction and text become one string, and values of cells become text.

The official evaluation puts a placeholder and a space in front where there is media. It removes the
placeholder again before a chat template is applied, so here it is left out from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.tables import Table

_V1_PLACEHOLDER = "<|image_1|>"


def instruct(instruction: str, text: str = "") -> str:
    """Instruction, a space and the text; the instruction alone where there is no text."""
    return f"{instruction} {text}" if text else instruction


def without_placeholder(text: str) -> str:
    """An instruction of MMEB-V1 without the place of its image."""
    return text.replace(_V1_PLACEHOLDER, "")


def as_in_v1(text: str) -> str:
    """Spaces in front of line breaks left out, as the first version of the benchmark had them."""
    return text.replace(" \n", "\n")


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A cell's text; empty where the cell is.

    Raises:
        DataError: it is not text.
    """
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    return value


def texts_of(row: Mapping[str, Any], column: str) -> Sequence[str]:
    """A cell's list of texts.

    Raises:
        DataError: it is not one, or it is empty.
    """
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"column {column!r} must hold lists of texts")
    if not value:
        raise DataError(f"column {column!r} has an empty list, so a query has no answer")
    return value


def name_of(value: Any) -> str:
    """An id as a string, whether tables have it as a number or as text."""
    return str(value)


@contextmanager
def row_named(table: Table, index: int) -> Iterator[None]:
    """Errors of this block say which row they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{table.files[0]}, row {index}: {error}") from None
