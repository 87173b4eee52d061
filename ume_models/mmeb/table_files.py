"""The table files that scores were made from, as they were then.

Tasks add up in an output folder. One that is not evaluated again keeps its score, unless its tables
have changed in between: then nobody knows what the score would be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ume_models.atomic import write_atomically
from ume_models.mmeb.dataset import TaskData

TABLE_FILES = "tables.json"


def note_tables(folder: Path, read: Sequence[TaskData]) -> None:
    """Keep sizes and times of the tables of these tasks beside those of others."""
    known = _known(folder)
    for data in read:
        known[data.task.name] = {str(path.absolute()): _state(path) for path in data.files}
    write_atomically(folder / TABLE_FILES, json.dumps(known, indent=1).encode())


def changed_tables(folder: Path, tasks: Iterable[str]) -> dict[str, str]:
    """Those of the tasks whose tables are not what they were, with what to do about it.

    A file that is gone says nothing: its disk may not be mounted.
    """
    known, found = _known(folder), {}
    for task in tasks:
        for path, before in known.get(task, {}).items():
            now = _state(Path(path))
            if now is not None and now != before:
                found[task] = f"{path} has changed since; name the task to evaluate it again"
                break
    return found


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads((folder / TABLE_FILES).read_bytes())
        return {str(task): dict(files) for task, files in value.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}  # damaged or not there: as good as never noted
