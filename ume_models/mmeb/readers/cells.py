"""Values of cells: texts, names and paths, refused where they cannot be what they stand for.

Rows are mappings; a column that a row lacks counts as empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.table import Table

# What reading may run into where a table holds something else than its layout promises. What a
# defect of this package raises (TypeError, AttributeError, LookupError) is none of it.
UNEXPECTED = (OSError, RecursionError, ValueError)


def unexpected(error: Exception) -> str:
    """How one of ``UNEXPECTED`` is told."""
    what = f"{type(error).__name__}: {error}"
    return f"it is not in the layout that this task is published in ({what})"


def optional_text_of(row: Mapping[str, Any], column: str) -> str:
    """A cell's text; "" where there is none.

    Raises:
        DataError: it is not text, or not text that can be written.
    """
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    _require_characters(value, column)
    return value


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A cell's text, which may be "" but must be there.

    Raises:
        DataError: as :func:`optional_text_of`, or the cell is null.
    """
    if row.get(column) is None:
        raise DataError(f"column {column!r} is empty (null), where a text must be")
    return optional_text_of(row, column)


def texts_of(row: Mapping[str, Any], column: str) -> Sequence[str]:
    """A cell's list of texts.

    Raises:
        DataError: it is not one, or it is empty.
    """
    value = row.get(column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"column {column!r} must hold lists of texts, not {_shown(value)}")
    if not value:
        raise DataError(f"column {column!r} has an empty list, so a query has no answer")
    _require_characters("".join(value), column)
    return value


def optional_path_of(row: Mapping[str, Any], column: str) -> str:
    """A cell's path; "" where there is none.

    Raises:
        DataError: it is not one.
    """
    path = optional_text_of(row, column)
    _require_no_nul(path, column)
    return path


def path_of(row: Mapping[str, Any], column: str) -> str:
    """A cell's path.

    Raises:
        DataError: it is not one, or there is none.
    """
    path = optional_path_of(row, column)
    if not path:
        raise DataError(f"column {column!r} is empty, but a picture belongs to this text")
    return path


def paths_of(row: Mapping[str, Any], column: str) -> Sequence[str]:
    """A cell's list of texts, where every one is a path or "" for none.

    Raises:
        DataError: it is not one, or it is empty.
    """
    paths = texts_of(row, column)
    _require_no_nul("".join(paths), column)
    return paths


def name_of(row: Mapping[str, Any], column: str) -> str:
    """An id as a string, whether tables have it as a number or as text. It may name a file.

    Raises:
        DataError: it is neither, or empty.
    """
    value = row.get(column)
    if value is None or value == "":
        raise DataError(f"column {column!r} is empty, where a name must be")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"column {column!r} must hold texts or whole numbers, not {_shown(value)}")
    name = str(value)
    _require_characters(name, column)
    _require_no_nul(name, column)
    return name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _require_characters(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(
            f"column {column!r} holds half a character ({half}), which UTF-8 cannot have"
        ) from None


def _require_no_nul(path: str, column: str) -> None:
    if "\0" in path:
        raise DataError(f"column {column!r} holds a NUL byte, which no file's name can have")


@contextmanager
def row_named(table: Table, index: int) -> Iterator[None]:
    """Errors of this block say which row of a table they are about, and what to do."""
    with place_named(f"{table.files[0]}, row {index}", "get the table again"):
        yield


@contextmanager
def place_named(place: str, remedy: str) -> Iterator[None]:
    """Errors of this block say which place they are about, and what to do; all are DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}; {remedy}") from None
    except UNEXPECTED as error:
        raise DataError(f"{place}: {unexpected(error)}; {remedy}") from error
