"""A task as it was read: queries with their answers, and the candidates they are ranked among."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ume_models.mmeb.tasks import InstructionSet, Labels, Task
from ume_models.processing.items import Item


def require_one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise ValueError, with the values that are known, for an option that has none of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


@dataclass(frozen=True)
class ReadOptions:
    """How tasks are read.

    Attributes:
        labels: "fixed", or "legacy" for the labels published first.
        instructions: the wording of "plume" or of "vlm2vec".
        limit: only the first so many queries of each task; candidates are never reduced.
        frames: how many stand for a video; None for those of the model's profile, or 8.
        momentseeker_leak: what the evaluation of PLUME does when a query's own picture is missing:
            take a frame of the right answer for it. Off, it is missing.
        download: fetch tables that are not on the disk from the hub.

    Raises:
        ValueError: a value is none of these.
    """

    labels: Labels = "fixed"
    instructions: InstructionSet = "plume"
    limit: int | None = None
    frames: int | None = None
    momentseeker_leak: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        require_one_of("labels", self.labels, get_args(Labels))
        require_one_of("instructions", self.instructions, get_args(InstructionSet))
        for name in ("limit", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}")


@dataclass(frozen=True)
class Query:
    """One query.

    Attributes:
        item: what is embedded; its id is unique within the task.
        relevant: names of the candidates that answer it, without repetition.
        grades: how relevant each of them is, in the same order; None where all count the same.
        candidates: names of its own candidates, in order (local ranking); empty for global.
        labels: ``relevant`` as the tables have them, numbers where they are numbers: the order in
            which the official metric pairs them with grades depends on it.
    """

    item: Item
    relevant: tuple[str, ...]
    grades: tuple[float, ...] | None = None
    candidates: tuple[str, ...] = ()
    labels: tuple[str | int, ...] = ()


class Candidates(ABC):
    """The candidates of a task: names at once, contents when asked for.

    Contents may lie inside of tables, so they are read one by one; consecutive positions are
    cheap. Safe to use from several threads.

    Attributes:
        names: unique names, in the order of the official evaluation: as queries name them first,
            then the rest of the collection.
        clashes: names that the tables give to several contents; the first one counts.
    """

    names: Sequence[str]
    clashes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Item]:
        """The items, in the order of ``names``."""
        return map(self.item, range(len(self)))

    def reading_order(self) -> Sequence[int]:
        """All positions in the order in which their contents are read fastest."""
        return range(len(self))

    @abstractmethod
    def item(self, position: int) -> Item:
        """The candidate at a position of ``names``; its id is the name.

        Raises:
            DataError: its content cannot be read.
        """


class ListedCandidates(Candidates):
    """Candidates whose items are known: texts, and media in files of their own.

    Args:
        items: name and item of every mention, in order; repetitions are dropped.
    """

    def __init__(self, items: Sequence[tuple[str, Item]]) -> None:
        kept: dict[str, Item] = {}
        clashes: dict[str, None] = {}
        for name, item in items:
            if name not in kept:
                kept[name] = item
            elif kept[name] != item:
                clashes[name] = None
        self.names = list(kept)
        self.clashes = list(clashes)
        self._items = list(kept.values())

    def item(self, position: int) -> Item:
        return self._items[position]


@dataclass(frozen=True)
class TaskData:
    """A task with its data.

    Attributes:
        task: its row of the table.
        queries: in the order of the tables.
        candidates: what they are ranked among.
        files: the table files that were read; they are part of what makes results stale.
    """

    task: Task
    queries: Sequence[Query]
    candidates: Candidates
    files: Sequence[Path] = ()
