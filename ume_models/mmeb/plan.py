"""Which embeddings are missing, cut into fixed shards that any process may compute.

An evaluation keeps its embeddings in stores of one input class each. A store is a fixed list of
keys, cut into fixed shards: whoever computes a shard, and after however many interruptions, has
the same batches and writes the same bytes. Content that several tasks share is embedded once.
Another selection of tasks in the same folder adds stores and uses what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ume_models.atomic import write_atomically
from ume_models.errors import ErrorKind, StoreError
from ume_models.json_files import read_object
from ume_models.mmeb.keys import KINDS, Kind, key_kind
from ume_models.store import EmbeddingStore, Manifest

# Items per shard: full batches, and little to lose. A text is tens of tokens, an image hundreds, a
# video thousands; a GPU does a shard in seconds, a CPU in minutes.
SHARD_SIZES: Mapping[str, Mapping[Kind, int]] = {
    "cpu": {"text": 512, "image": 64, "video": 16},
    "cuda": {"text": 4096, "image": 512, "video": 128},
}
_KEYS = "keys.json"


@dataclass(frozen=True)
class KeyedStore:
    """A store and the keys of its rows."""

    store: EmbeddingStore
    keys: Sequence[str]

    @property
    def kind(self) -> Kind:
        """The class of input it holds."""
        return key_kind(self.keys[0])

    def shard_keys(self, shard: int) -> Sequence[str]:
        """Keys of one shard."""
        rows = self.store.item_range(shard)
        return self.keys[rows.start : rows.stop]

    def finished(self) -> set[int]:
        """Shards that are complete and undamaged; every byte is read.

        One with a skipped item is tried again: what was wrong with it may be mended.
        """
        size = self.store.manifest.shard_size
        skipped = {entry.row // size for entry in self.store.skipped()}
        return {*range(self.store.num_shards)} - {*self.store.pending()} - skipped


@dataclass(frozen=True)
class Work:
    """One shard that is missing.

    Attributes:
        store: name of its store.
        shard: its number.
        items: how many items it has.
        kind: their input class.
    """

    store: str
    shard: int
    items: int
    kind: Kind


@dataclass(frozen=True)
class Plan:
    """What is there and what has to be computed.

    Attributes:
        stores: every store of the folder that this evaluation uses, by name.
        finished: shards that are done, by store.
        work: shards to compute, in the order in which tasks need them.
    """

    stores: Mapping[str, KeyedStore]
    finished: Mapping[str, set[int]]
    work: Sequence[Work]

    def close(self) -> None:
        """Let other processes write to the stores."""
        for held in self.stores.values():
            held.store.close()


def make_plan(
    folder: Path,
    wanted: Sequence[str],
    manifest: Manifest,
    shard_sizes: Mapping[Kind, int],
) -> Plan:
    """Open the stores of an evaluation's folder and begin those that are missing.

    Args:
        folder: the ``embeddings`` folder.
        wanted: unique keys in the order in which they are needed.
        manifest: describes the model and settings; names and sizes are filled in here.
        shard_sizes: items per shard of each input class.

    Raises:
        StoreError: a store was made with other settings, or another process writes to it.
    """
    needed = set(wanted)
    stores: dict[str, KeyedStore] = {}
    finished: dict[str, set[int]] = {}
    continued: set[str] = set()
    covered: set[str] = set()
    for name, keys, shard_size in _kept_stores(folder):
        if not needed.isdisjoint(keys):
            held = KeyedStore(_go_on(folder / name, keys, manifest, shard_size), keys)
            stores[name], finished[name] = held, held.finished()
            if needed.issuperset(keys):  # this selection's own, or one inside of it: gone on with
                continued.add(name)
                covered.update(keys)
            else:
                for shard in finished[name]:
                    covered.update(held.shard_keys(shard))
    for kind in KINDS:
        missing = [key for key in wanted if key not in covered and key_kind(key) == kind]
        if missing:
            name, held = _new_store(folder, missing, manifest, shard_sizes[kind])
            stores[name], finished[name] = held, set()
            continued.add(name)
    there = {
        key
        for name, shards in finished.items()
        for shard in shards
        for key in stores[name].shard_keys(shard)
    }
    order = {key: place for place, key in enumerate(wanted)}
    work = [
        Work(name, shard, len(stores[name].store.item_range(shard)), stores[name].kind)
        for name in continued
        for shard in range(stores[name].store.num_shards)
        # A later, smaller selection may have embedded it in a store of its own.
        if shard not in finished[name] and not there.issuperset(stores[name].shard_keys(shard))
    ]
    work.sort(key=lambda part: order[stores[part.store].shard_keys(part.shard)[0]])
    return Plan(stores, finished, work)


def open_store(folder: Path, name: str) -> KeyedStore:
    """A store that this or another process has begun, for reading and for adding shards.

    Raises:
        StoreError: it is missing or damaged.
    """
    kept = _read_keys(folder / name)
    if kept is None:
        raise StoreError(f"{folder / name} has no usable {_KEYS}: remove that folder and run again")
    return KeyedStore(EmbeddingStore.attach(folder / name), kept[0])


def kept_stores(folder: Path) -> Iterable[KeyedStore]:
    """All stores of an ``embeddings`` folder."""
    return (open_store(folder, name) for name, _, _ in _kept_stores(folder))


def _kept_stores(folder: Path) -> list[tuple[str, list[str], int]]:
    """Name, keys and shard size of every store."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        kept = _read_keys(path) if path.is_dir() else None
        if kept is not None:
            keys, shard_size = kept
            if not path.name.endswith(_digest(keys)[:12]):
                raise StoreError(_damaged(path, f"{path / _KEYS} is not what its folder is named"))
            found.append((path.name, keys, shard_size))
    return found


def _new_store(
    folder: Path, keys: Sequence[str], manifest: Manifest, shard_size: int
) -> tuple[str, KeyedStore]:
    path = folder / f"{key_kind(keys[0])}-{_digest(keys)[:12]}"
    path.mkdir(parents=True, exist_ok=True)
    # The keys first: a store is one as soon as they are there.
    rows = {"shard_size": shard_size, "keys": list(keys)}
    write_atomically(path / _KEYS, json.dumps(rows, indent=0).encode())
    return path.name, KeyedStore(_begin(path, keys, manifest, shard_size), keys)


def _begin(path: Path, keys: Sequence[str], manifest: Manifest, shard_size: int) -> EmbeddingStore:
    return EmbeddingStore.begin(path, manifest.of_items(_digest(keys), len(keys), shard_size))


def _go_on(path: Path, keys: Sequence[str], manifest: Manifest, shard_size: int) -> EmbeddingStore:
    """Open a store that is there; what is wrong with it concerns its folder alone."""
    try:
        return _begin(path, keys, manifest, shard_size)
    except StoreError as error:
        if error.kind is ErrorKind.HELD:
            raise
        raise StoreError(_damaged(path, error.message)) from error


def _damaged(path: Path, what: str) -> str:
    return (
        f"{what}\n{path} is damaged: remove this folder and run again; only what it holds is "
        "embedded anew"
    )


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _read_keys(path: Path) -> tuple[list[str], int] | None:
    """Keys and shard size of a store; None for what is not one."""
    try:
        rows = read_object(path / _KEYS)
        keys, shard_size = [str(key) for key in rows["keys"]], int(rows["shard_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (keys, shard_size) if keys and shard_size > 0 else None
