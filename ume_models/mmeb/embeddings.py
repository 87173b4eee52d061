"""Embeddings of an evaluation, found by their keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ume_models.errors import StoreError
from ume_models.mmeb.listing import listing_path, read_listing
from ume_models.mmeb.plan import KeyedStore, kept_stores
from ume_models.store import Shard

_SHARDS_IN_MEMORY = 8
_AGAIN = "run `ume eval` with this output folder again"


class EmbeddingLookup:
    """Rows of stores by key. Shards are read when needed, the last few stay in memory.

    Args:
        stores: the stores, by name.
    """

    def __init__(self, stores: Mapping[str, KeyedStore]) -> None:
        self._stores = stores
        self._where: dict[str, tuple[str, int]] = {}
        self._read: OrderedDict[tuple[str, int], _Rows] = OrderedDict()

    def add(self, store: str, shard: int) -> None:
        """Make the rows of a finished shard known."""
        place = (store, shard)
        for key in self._stores[store].shard_keys(shard):
            self._where.setdefault(key, place)

    def has(self, key: str) -> bool:
        """Whether the shard with this key is finished, be its item embedded or skipped."""
        return key in self._where

    def find(self, keys: Sequence[str]) -> tuple[torch.Tensor, dict[str, str]]:
        """Embeddings of items, and why some have none. Every shard is read once.

        Args:
            keys: at least one; repetitions are allowed.

        Returns:
            float32 ``[len(keys), D]`` with rows of NaN for skipped items; and the reasons of these
            by key, in the order of ``keys``.

        Raises:
            StoreError: a shard is damaged.
            KeyError: no known shard has a key.
        """
        of_shard: dict[tuple[str, int], list[int]] = {}
        for position, key in enumerate(keys):
            of_shard.setdefault(self._where[key], []).append(position)
        found: torch.Tensor | None = None
        reasons: dict[int, str] = {}
        for place, positions in of_shard.items():
            held = self._rows(place)
            if found is None:
                found = torch.full((len(keys), held.embeddings.shape[1]), torch.nan)
            there = []
            for position in positions:
                if (reason := held.skipped.get(keys[position])) is None:
                    there.append(position)
                else:
                    reasons[position] = reason
            # Copied: a view would keep its whole shard in memory.
            found[there] = held.embeddings[[held.position[keys[position]] for position in there]]
        if found is None:
            raise KeyError("no keys")
        return found, {keys[position]: reasons[position] for position in sorted(reasons)}

    def _rows(self, place: tuple[str, int]) -> _Rows:
        if place not in self._read:
            name, number = place
            self._read[place] = _Rows(self._stores[name].store.read(number))
            if len(self._read) > _SHARDS_IN_MEMORY:
                self._read.popitem(last=False)
        self._read.move_to_end(place)
        return self._read[place]


class _Rows:
    """One shard in memory."""

    def __init__(self, shard: Shard) -> None:
        self.embeddings = shard.embeddings
        self.position = {record.id: row for row, record in enumerate(shard.records)}
        self.skipped = {skipped.id: skipped.reason for skipped in shard.skipped}


def task_embeddings(folder: Path, task: str) -> tuple[torch.Tensor, torch.Tensor, list[str]] | None:
    """What an evaluation embedded for a task.

    Args:
        folder: the output folder of ``ume eval``.
        task: name of the task.

    Returns:
        Queries float32 ``[Q, D]``, candidates float32 ``[C, D]`` and the candidates' names; None
        where the folder has none, as for scores of stored embeddings, or not all of them.

    Raises:
        StoreError: the listing or a shard is damaged.
    """
    path = listing_path(folder, task)
    if not path.is_file():
        return None
    try:
        listing = read_listing(folder, task)
    except RecursionError:
        raise StoreError(f"{path} is damaged: {_AGAIN}") from None
    if not listing.queries or not listing.candidates:
        raise StoreError(f"{path} lists no queries or no candidates: {_AGAIN}")
    stores = {held.store.directory.name: held for held in kept_stores(folder / "embeddings")}
    needed = set(listing.all_keys())
    lookup = EmbeddingLookup(stores)
    for name, held in stores.items():
        for shard in range(held.store.num_shards):
            if not needed.isdisjoint(held.shard_keys(shard)) and held.store.has(shard):
                lookup.add(name, shard)
    keys = [*listing.all_keys()]
    if not all(map(lookup.has, keys)):
        return None
    try:
        rows, skipped = lookup.find(keys)
    except StoreError as error:
        raise StoreError(f"{task}: {error}") from error
    if skipped:
        return None
    queries = len(listing.queries)
    return rows[:queries], rows[queries:], list(listing.names)
