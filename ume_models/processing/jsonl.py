"""Reading items from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ume_models.errors import UmeError


def read_items(path: str | Path) -> list[Mapping[str, Any]]:
    """Read one JSON object per line; blank lines are skipped, a UTF-8 byte order mark is fine.

    Only the JSON is checked here; the fields are checked by
    :func:`ume_models.processing.parse_item`. Pass ``Path(path).parent`` as its ``base_dir`` so
    that media paths are relative to the file they are written in.

    Raises:
        UmeError: if the file cannot be read, or for the first line which is not a JSON object
            in UTF-8; the message has the file and the line number.
    """
    path = Path(path)
    items: list[Mapping[str, Any]] = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if not raw.strip():
                    continue
                items.append(_parse_line(raw, f"{path}, line {number}"))
    except OSError as error:
        raise UmeError(f"{path}: cannot be read: {error.strerror or error}") from error
    return items


def _parse_line(raw: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UmeError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UmeError(
            f"{where}: not valid JSON ({error}); each line must be one object"
        ) from error
    if not isinstance(value, dict):
        raise UmeError(
            f'{where}: expected a JSON object such as {{"text": …}}, got {type(value).__name__}'
        )
    return value
