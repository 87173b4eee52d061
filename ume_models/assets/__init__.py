"""What ships inside the package: a small trained checkpoint and held-out items to try it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ume_models.errors import UmeError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """One held-out retrieval task.

    Attributes:
        name: identifies the task, e.g. ``"scene_t2i"``.
        kind: what is on the two sides, e.g. ``"text→image"``.
        instruction: what the queries ask for.
        queries: items for ``model.encode``, paths absolute.
        candidates: items for ``model.encode``, paths absolute.
        relevant: for each query, the ids of the candidates that answer it.
    """

    name: str
    kind: str
    instruction: str
    queries: list[dict[str, Any]]
    candidates: list[dict[str, Any]]
    relevant: list[list[str]]


@dataclass(frozen=True)
class HeldOut:
    """All held-out tasks that ship with the package."""

    tasks: list[Task]


def tiny_checkpoint() -> Path:
    """Directory of the bundled checkpoint, in the official layout.

    Raises:
        UmeError: the files are missing from the installation.
    """
    directory = _HERE / "tiny"
    if not (directory / "model.safetensors").is_file():
        raise UmeError(
            f"{directory}: the bundled checkpoint is missing; reinstall the package, or train it "
            f"in a checkout: python -m tests.support.bundled.tiny -o {directory}"
        )
    return directory


def heldout(directory: Path | None = None) -> HeldOut:
    """Held-out items the bundled checkpoint was not trained on, with absolute paths.

    Args:
        directory: another directory written by ``tests.support.bundled.heldout_files``.

    Raises:
        UmeError: the manifest is missing.
    """
    root = (directory or _HERE / "heldout").resolve()
    manifest = root / "heldout.json"
    if not manifest.is_file():
        raise UmeError(
            f"{manifest}: the held-out items are missing; reinstall the package, or write them "
            f"in a checkout: python -m tests.support.bundled.heldout_files -o {root}"
        )
    content = json.loads(manifest.read_text(encoding="utf-8"))
    return HeldOut([_read_task(entry, root) for entry in content["tasks"]])


def _read_task(entry: dict[str, Any], root: Path) -> Task:
    return Task(
        name=entry["name"],
        kind=entry["kind"],
        instruction=entry["instruction"],
        queries=[_absolute(query["item"], root) for query in entry["queries"]],
        candidates=[_absolute(item, root) for item in entry["candidates"]],
        relevant=[list(query["relevant"]) for query in entry["queries"]],
    )


def _absolute(item: dict[str, Any], root: Path) -> dict[str, Any]:
    item = dict(item)
    if "image" in item:
        item["image"] = str(root / item["image"])
    if "video" in item:
        item["video"] = [str(root / frame) for frame in item["video"]]
    return item
