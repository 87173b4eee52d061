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
        for key in self._stores[store].shard_keys(shard):
            self._where.setdefault(key, (store, shard))

    def has(self, key: str) -> bool:
        """Whether the shard with this key is finished, be its item embedded or skipped."""
        return key in self._where

    def problems(self, keys: Sequence[str]) -> dict[str, str]:
        """Those of the keys whose items were skipped, with the reasons."""
        return {
            key: reason for key in keys if (reason := self._rows(key).skipped.get(key)) is not None
        }

    def rows(self, keys: Sequence[str]) -> torch.Tensor:
        """Embeddings float32 ``[len(keys), D]``.

        Raises:
            StoreError: a shard is damaged.
            KeyError: an item has none.
        """
        found: list[torch.Tensor] = []
        for key in keys:
            held = self._rows(key)
            found.append(held.embeddings[held.position[key]])
        return torch.stack(found)

    def _rows(self, key: str) -> _Rows:
        place = self._where[key]
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
    try:
        queries = lookup.rows(listing.queries)
        candidates = lookup.rows(listing.candidates)
    except KeyError:
        return None
    except StoreError as error:
        raise StoreError(f"{task}: {error}") from error
    return queries, candidates, list(listing.names)
