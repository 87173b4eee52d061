"""The held-out items of the package as things to ask for: a caption, a picture, another picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from ume_models.assets import heldout


@dataclass(frozen=True)
class Thing:
    """Something that can be shown and described.

    Attributes:
        id: unique within its pool, and usable as a file name.
        caption: what it is in words; empty where none ships.
        shown: the frames of one picture (one frame) or clip (four); empty where none ships.
        again: another picture of the same thing; empty where none ships.
    """

    id: str
    caption: str = ""
    shown: tuple[Path, ...] = ()
    again: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Different things of one kind.

    Attributes:
        whole: things with both sides of the held-out task they come from.
        partial: things with the candidates' side alone.
    """

    whole: tuple[Thing, ...]
    partial: tuple[Thing, ...]

    def draw(
        self, rng: Random, queries: int, candidates: int, has: Callable[[Thing], object]
    ) -> tuple[list[Thing], list[Thing]]:
        """Things to ask for, and all that is ranked, in a random order.

        Args:
            rng: what the draw follows from.
            queries: number of things asked for.
            candidates: number of things ranked, those asked for among them.
            has: the part that a candidate must have.
        """
        asked = rng.sample(self.whole, queries)
        rest = [t for t in (*self.whole, *self.partial) if has(t) and t not in asked]
        ranked = asked + rng.sample(rest, min(candidates - queries, len(rest)))
        return asked, rng.sample(ranked, len(ranked))


@lru_cache(maxsize=1)
def pools() -> dict[str, Pool]:
    """The pools by the name of the held-out task they come from, such as "scene_t2i"."""
    return {task.name: _pool(task.queries, task.candidates, task.relevant)
            for task in heldout().tasks}  # fmt: skip


def _pool(
    queries: Sequence[dict[str, Any]],
    candidates: Sequence[dict[str, Any]],
    relevant: Sequence[Sequence[str]],
) -> Pool:
    left = {candidate["id"]: candidate for candidate in candidates}
    whole = []
    for query, (answer, *_) in zip(queries, relevant, strict=True):
        target = left.pop(answer)
        caption = query.get("text") or target.get("text", "")
        first, second = _frames(query), _frames(target)
        whole.append(Thing(query["id"], caption, first or second, second if first else ()))
    partial = []
    for item in left.values():
        frames = _frames(item)
        # Where pictures are asked for with pictures, candidates are the second ones.
        paired = bool(whole[0].again)
        partial.append(
            Thing(item["id"], item.get("text", ""), () if paired else frames,
                  frames if paired else ())
        )  # fmt: skip
    return Pool(tuple(whole), tuple(partial))


def _frames(item: dict[str, Any]) -> tuple[Path, ...]:
    if "video" in item:
        return tuple(Path(frame) for frame in item["video"])
    return (Path(item["image"]),) if "image" in item else ()


def caption_of(thing: Thing) -> str:
    """The caption; as a key function of ``Pool.draw``."""
    return thing.caption


def shown_of(thing: Thing) -> tuple[Path, ...]:
    """The first picture; as a key function of ``Pool.draw``."""
    return thing.shown


def again_of(thing: Thing) -> tuple[Path, ...]:
    """The second picture; as a key function of ``Pool.draw``."""
    return thing.again
