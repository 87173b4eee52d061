"""Write held-out sets as files: PNG pictures and one manifest of ``model.encode`` items.

python -m tests.support.bundled.heldout_files -o DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .heldout import Entry, HeldOutTask, build_heldout


def write_heldout(sets: Sequence[HeldOutTask], directory: Path) -> None:
    """Write ``heldout.json`` and ``images/`` below ``directory``; paths in it are relative."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    tasks = []
    for heldout in sets:
        task = heldout.task
        candidates = [
            _write_item(entry, task.target_instruction, directory) for entry in heldout.candidates
        ]
        queries = [
            {
                "item": _write_item(entry, task.query_instruction, directory),
                "relevant": [heldout.candidates[i].id for i in wanted],
            }
            for entry, wanted in zip(heldout.queries, heldout.relevant(), strict=True)
        ]
        tasks.append(
            {
                "name": task.name,
                "kind": task.kind,
                "instruction": task.query_instruction,
                "queries": queries,
                "candidates": candidates,
            }
        )
    text = json.dumps({"tasks": tasks}, indent=1, ensure_ascii=False) + "\n"
    (directory / "heldout.json").write_text(text, encoding="utf-8")


def _write_item(entry: Entry, instruction: str, directory: Path) -> dict[str, Any]:
    item: dict[str, Any] = {"id": entry.id}
    if instruction:
        item["instruction"] = instruction
    if entry.pixels is None:
        item["text"] = entry.caption
        return item
    paths = []
    for number, frame in enumerate(entry.pixels):
        suffix = f"-{number}" if len(entry.pixels) > 1 else ""
        path = f"images/{entry.id}{suffix}.png"
        Image.fromarray(frame).save(directory / path, optimize=True)
        paths.append(path)
    if len(paths) == 1:
        item["image"] = paths[0]
    else:
        item["video"] = paths
    return item


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.bundled.heldout_files",
        description="Write the held-out items that ship with the package.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--queries", type=int, default=16, help="queries per task")
    parser.add_argument("--candidates", type=int, default=40, help="candidates per task")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    sets = build_heldout(options.seed, options.queries, options.candidates)
    write_heldout(sets, options.output)


if __name__ == "__main__":
    main()
