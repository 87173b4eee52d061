"""Held-out retrieval sets: combinations, digits and pictures that training never sees."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from .families import FAMILIES
from .tasks import TASKS, Task


@dataclass(frozen=True)
class Entry:
    """One query or candidate: a caption, or the frames of a picture (uint8 ``[T, H, W, 3]``)."""

    id: str
    key: str
    caption: str
    pixels: np.ndarray | None


@dataclass(frozen=True)
class HeldOutTask:
    """Queries and candidates of one task; a candidate is relevant if it shows the same thing."""

    task: Task
    queries: list[Entry]
    candidates: list[Entry]

    def relevant(self) -> list[list[int]]:
        """Candidate positions that answer each query."""
        return [
            [i for i, candidate in enumerate(self.candidates) if candidate.key == query.key]
            for query in self.queries
        ]


def build_heldout(
    seed: int, queries: int, candidates: int, tasks: tuple[Task, ...] = TASKS
) -> list[HeldOutTask]:
    """Draw held-out sets; every query has exactly one relevant candidate.

    Combinations of shapes, colours, words and so on come from the part of each family that
    training leaves out. There are only a hundred numbers, so all of them are ranked; there
    the digits themselves are held out, in the queries and in the candidates.

    Args:
        seed: seed of the draw.
        queries: queries per task, at most ``candidates``.
        candidates: candidates per task, fewer where a family has fewer combinations.
        tasks: the tasks to draw for.
    """
    built = []
    for task in tasks:
        family = FAMILIES[task.family]
        rng = Random(f"{seed}/held-out/{task.name}")
        specs = list(family.specs() if family.name == "digits" else family.split(held_out=True))
        chosen = rng.sample(specs, min(candidates, len(specs)))
        asked = rng.sample(chosen, min(queries, len(chosen)))
        sides = []
        for side, visual, wanted in (
            ("q", task.query_visual, asked),
            ("c", task.target_visual, chosen),
        ):
            entries = []
            for i, spec in enumerate(wanted):
                pixels = None
                if visual:
                    frames = family.render(spec, rng, True)
                    pixels = np.stack([np.asarray(frame) for frame in frames])
                caption = family.caption(spec, rng)
                entries.append(
                    Entry(f"{task.name}-{side}{i:03d}", family.key(spec), caption, pixels)
                )
            sides.append(entries)
        built.append(HeldOutTask(task, *sides))
    return built
