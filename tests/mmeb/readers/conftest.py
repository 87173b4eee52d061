"""Small data roots, written row by row."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.mmeb_v2 import MMEB_V2, MMEB_V2_2026
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.tasks import Task

TASKS: Mapping[str, Task] = {task.name: task for task in MMEB_V2}
CORRECTED: Mapping[str, Task] = {task.name: task for task in MMEB_V2_2026}


class Root:
    """A data root of MMEB-v2."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self, path: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """A jsonl file below the root."""
        place = self.path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return place

    def files(self, folder: str, *names: str) -> Path:
        """Empty files: readers never look into media."""
        place = self.path / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (place / name).touch()
        return place

    def read(self, task: str, *, corrected: bool = False, **options: Any) -> TaskData:
        """One task; of the benchmark's corrected version if asked for."""
        return read_task(
            (CORRECTED if corrected else TASKS)[task], self.path, ReadOptions(**options)
        )


@pytest.fixture(autouse=True)
def _without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has in the hub's cache, tests do not see it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


@pytest.fixture
def names_of_video() -> Callable[[Any], list[str]]:
    """Names of an item's frames."""
    return lambda item: [Path(frame).name for frame in item.video]
