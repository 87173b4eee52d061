"""What a task needs embedded: the keys of its queries and candidates, kept beside its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ume_models.atomic import write_atomically
from ume_models.errors import StoreError
from ume_models.mmeb.dataset import TaskData
from ume_models.mmeb.keys import ContentKeys
from ume_models.processing.items import Item

Side = Literal["query", "candidate"]


@dataclass(frozen=True)
class Listing:
    """Keys of everything a task embeds.

    Attributes:
        task: name of the task.
        queries: key of each query.
        names: names of the candidates.
        candidates: key of each candidate.
    """

    task: str
    queries: Sequence[str]
    names: Sequence[str]
    candidates: Sequence[str]

    def all_keys(self) -> Iterator[str]:
        """All keys, queries first."""
        yield from self.queries
        yield from self.candidates


def list_task(data: TaskData, keys: ContentKeys) -> Listing:
    """Read a task's media once and name what is in them.

    Raises:
        DataError: a table cannot be read.
    """
    order = data.candidates.reading_order()
    found = keys.keys(lambda number: data.candidates.item(order[number]), len(order))
    of_position = dict(zip(order, found, strict=True))
    return Listing(
        data.task.name,
        keys.keys(lambda position: data.queries[position].item, len(data.queries)),
        list(data.candidates.names),
        [of_position[position] for position in range(len(order))],
    )


def needed_keys(tasks: Iterable[TaskData], listings: Iterable[Listing]) -> list[str]:
    """Every key once, in the order in which tasks need them and their contents are read fastest."""
    wanted: dict[str, None] = {}
    for data, listing in zip(tasks, listings, strict=True):
        wanted.update(dict.fromkeys(listing.queries))
        order = data.candidates.reading_order()
        wanted.update(dict.fromkeys(listing.candidates[position] for position in order))
    return list(wanted)


def answers_digest(data: TaskData, listing: Listing) -> str:
    """A digest of all that a task's score is made from beside the model: equal digests, same data.

    It covers the prompts and the bytes of the media, by the keys of what is embedded.
    """
    task = data.task
    state = hashlib.sha256(f"{task.benchmark} {task.metric} {task.ranking}\n".encode())
    for key in listing.all_keys():
        state.update(key.encode() + b"\n")
    for query in data.queries:
        row = [query.item.id, query.relevant, query.grades, query.candidates, query.labels]
        state.update(json.dumps(row).encode() + b"\n")
    state.update(json.dumps(list(listing.names)).encode())
    return state.hexdigest()[:32]


def listing_path(folder: Path, task: str) -> Path:
    """Where the listing of a task is in an evaluation's folder."""
    return folder / "tasks" / task / "items.json"


def write_listing(folder: Path, listing: Listing) -> None:
    """Keep a listing; it tells which embedding belongs to which query and candidate."""
    path = listing_path(folder, listing.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "queries": list(listing.queries),
        "candidates": [[*pair] for pair in zip(listing.names, listing.candidates, strict=True)],
    }
    write_atomically(path, (json.dumps(rows, ensure_ascii=False, indent=0) + "\n").encode(
        errors="surrogatepass"
    ))  # fmt: skip


def read_listing(folder: Path, task: str) -> Listing:
    """What ``write_listing`` kept.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = listing_path(folder, task)
    try:
        rows = json.loads(path.read_bytes())
        names = [str(name) for name, _ in rows["candidates"]]
        keys = [str(key) for _, key in rows["candidates"]]
        return Listing(task, [str(key) for key in rows["queries"]], names, keys)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}): run `ume eval` with this output folder again"
        ) from None


@dataclass(frozen=True)
class Place:
    """Where the content of a key is found: a query or candidate of a task."""

    task: str
    side: Side
    position: int

    def __str__(self) -> str:
        return f"{self.task}, {self.side} {self.position}"

    def item(self, data: TaskData) -> Item:
        """The item itself, out of the task's data."""
        if self.side == "query":
            return data.queries[self.position].item
        return data.candidates.item(self.position)


def places(listings: Iterable[Listing]) -> Mapping[str, Place]:
    """The first place of every key."""
    found: dict[str, Place] = {}
    for listing in listings:
        sides: tuple[tuple[Side, Sequence[str]], ...] = (
            ("query", listing.queries),
            ("candidate", listing.candidates),
        )
        for side, keys in sides:
            for position, key in enumerate(keys):
                if key not in found:
                    found[key] = Place(listing.task, side, position)
    return found
