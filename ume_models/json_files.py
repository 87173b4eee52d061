"""JSON of files that may be anybody's: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MAX_DEPTH = 50  # what walks the content later may recurse; published files are 5 deep


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON in UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing, a pipe or a device, is not JSON in UTF-8, is nested more
            than 50 levels deep, or is no object.
    """
    if not path.is_file():  # a pipe, say, would be waited for
        raise ValueError("not a regular file" if path.exists() else "file not found")
    try:
        content = parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    return content


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
