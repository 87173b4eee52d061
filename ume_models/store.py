"""Embeddings on disk: fixed shards written one by one, so that a stopped run can go on.

    DIR/manifest.json                        what the embeddings are of and how they were made
    DIR/shard-00000-of-00012.json            the items of the shard, and those that were skipped
    DIR/shard-00000-of-00012.safetensors     "embeddings" [n, D] float32, "rows" [n] int64

The JSON also holds the SHA-256 of the tensors, so that bytes that flipped on the disk are noticed.
A shard is a fixed range of the items, whatever was done before, so a resumed run writes the same
bytes as an uninterrupted one. Its JSON is written first and its tensors last: a shard is done when
its tensor file is there, complete, and names the digest of the JSON beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from ume_models.atomic import remove_leftovers, write_atomically
from ume_models.errors import ErrorKind, StoreError
from ume_models.json_files import parse, read_object
from ume_models.profile import BEFORE_PROFILES

FORMAT = "ume-embeddings"
FORMAT_VERSION = 1
LOCK_FILE = ".ume-lock"
_MANIFEST = "manifest.json"
_EMBEDDING_BYTES, _ROW_BYTES = 4, 8  # float32, int64
_SHARD_NAME = re.compile(r"shard-\d{5,}-of-\d{5,}\.(safetensors|json)")
# Told for the reader's sake; a run with another value of these still writes the same embeddings.
_INFORMATIVE = frozenset({"model", "media_folders"})


@dataclass(frozen=True)
class Manifest:
    """What a store holds. Two runs may share a store when these agree.

    Attributes:
        package_version: version of this package that began the store.
        model: path or name of the checkpoint, as given.
        fingerprint: identity of its weights and configuration.
        hidden_size: columns D of the embeddings.
        encoding: every setting that changes an embedding (mode, latent steps, dtype, …).
        items_digest: SHA-256 of the items file.
        num_items: items in that file.
        shard_size: items per shard.
        media_folders: folders against which media paths of the items are resolved.
    """

    package_version: str
    model: str
    fingerprint: str
    hidden_size: int
    encoding: Mapping[str, Any]
    items_digest: str
    num_items: int
    shard_size: int
    media_folders: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written, with the name and version of the format."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["encoding"] = dict(self.encoding)
        fields["media_folders"] = list(self.media_folders)
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_json(cls, value: Any, source: Path) -> Manifest:
        """Inverse of ``to_json``.

        Raises:
            StoreError: not a manifest, of a newer format, or a field is missing or ill-typed.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StoreError(f"{source} is not the manifest of an embedding store")
        if value.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{source} has format version {value.get('format_version')!r}; this version of "
                f"ume reads {FORMAT_VERSION}: update ume, or embed the items again"
            )
        types: dict[str, type] = {
            "package_version": str,
            "model": str,
            "fingerprint": str,
            "hidden_size": int,
            "encoding": dict,
            "items_digest": str,
            "num_items": int,
            "shard_size": int,
            "media_folders": list,
        }
        for name, kind in types.items():
            if not isinstance(value.get(name), kind):
                raise StoreError(f"{source}: {name!r} is missing or not a {kind.__name__}")
        if value["num_items"] < 1 or value["shard_size"] < 1 or value["hidden_size"] < 1:
            raise StoreError(f"{source}: num_items, shard_size and hidden_size must be positive")
        return cls(**{name: value[name] for name in types})

    def of_items(self, items_digest: str, num_items: int, shard_size: int) -> Manifest:
        """The same model and settings for other items."""
        return replace(self, items_digest=items_digest, num_items=num_items, shard_size=shard_size)

    def differences(self, other: Manifest) -> list[str]:
        """One line for each setting in which ``other`` is not what this store holds."""
        changed = self.items_digest != other.items_digest
        silent = {*_INFORMATIVE, "items_digest"}
        others = setting_differences(self.to_json(), other.to_json(), silent, "in the store")
        return ["the items file has changed"] * changed + others


def setting_differences(
    there: Mapping[str, Any], now: Mapping[str, Any], informative: Collection[str], where: str
) -> list[str]:
    """One line for each setting in which two manifests differ, but for informative ones."""
    mine, theirs = _flat(there), _flat(now)
    remedies = {"profile": f" (--profile {mine.get('profile')} goes on with it)"}
    return [
        f"{name}: {mine.get(name)!r} {where}, {theirs.get(name)!r} now{remedies.get(name, '')}"
        for name in sorted(mine.keys() | theirs.keys())
        if name not in informative and mine.get(name) != theirs.get(name)
    ]


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their plain name; JSON round trip, so that tuples and lists compare equal."""
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    settings = plain.pop("encoding", None) or plain.pop("settings", {})
    flat: dict[str, Any] = {}
    for name, value in {**under_profile(settings), **plain}.items():
        inner = value if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat


def under_profile(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with family and profile; before these had names, all were PLUME's."""
    named = {} if "source" in settings else {"embedder": "plume", "profile": BEFORE_PROFILES}
    return {**named, **settings}


def require_one_profile(
    one: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]], remedy: str
) -> None:
    """Refuse to mix embeddings of two profiles of one family.

    Args:
        one, other: what is named in the message, and its recorded settings.
        remedy: what to do.

    Raises:
        StoreError: the profiles differ, by name or by what the name stands for; both are named.
    """
    keys = ("embedder", "profile", "profile_fingerprint")
    mine, theirs = ([under_profile(of).get(key, "") for key in keys] for _, of in (one, other))
    if mine[0] == theirs[0] and mine != theirs:
        raise StoreError(
            f"{one[0]} has the profile {' '.join(mine[1:])}, {other[0]} has "
            f"{' '.join(theirs[1:])}: embeddings of two profiles are never mixed; {remedy}"
        )


@dataclass(frozen=True)
class Record:
    """What is kept of an item beside its embedding, enough to show it.

    Attributes:
        id: the item's id.
        text: its text, possibly empty.
        images: paths of its images, as in the items file.
        video: paths of its frames.
    """

    id: str
    text: str = ""
    images: tuple[str, ...] = ()
    video: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields that are not empty."""
        fields: dict[str, Any] = {"id": self.id}
        if self.text:
            fields["text"] = self.text
        if self.images:
            fields["images"] = list(self.images)
        if self.video:
            fields["video"] = list(self.video)
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Inverse of ``to_json``."""
        return cls(
            id=str(value["id"]),
            text=str(value.get("text", "")),
            images=tuple(map(str, value.get("images", ()))),
            video=tuple(map(str, value.get("video", ()))),
        )


@dataclass(frozen=True)
class Skipped:
    """An item that has no embedding, and why.

    Attributes:
        row: its position among all items, from 0.
        id: its id.
        reason: what was wrong with it.
    """

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """The embeddings of one range of items.

    Attributes:
        rows: int64 ``[n]``, increasing positions of the items among all items.
        embeddings: float32 ``[n, D]``.
        records: n records, in the same order.
        skipped: the items of the range without a row.
    """

    rows: torch.Tensor
    embeddings: torch.Tensor
    records: Sequence[Record]
    skipped: Sequence[Skipped] = ()


@dataclass(frozen=True)
class _Listing:
    """The JSON beside the tensors of a shard."""

    records: list[Record]
    skipped: list[Skipped]
    digests: dict[str, str]


class EmbeddingStore:
    """A folder of embeddings. ``begin`` opens it for writing, ``open`` a finished one for reading.

    Attributes:
        directory: the folder.
        manifest: what it holds.
    """

    def __init__(self, directory: Path, manifest: Manifest, lock: int | None = None) -> None:
        self.directory = directory
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def begin(
        cls, directory: str | Path, manifest: Manifest, *, overwrite: bool = False
    ) -> EmbeddingStore:
        """Create a store, or go on with one that was begun with the same settings.

        Args:
            directory: created if missing.
            manifest: what this run is going to write.
            overwrite: delete the shards of an earlier run first. No other file is touched.

        Raises:
            StoreError: the folder holds a store with other settings, which are named, another
                process is writing to it, or it cannot be read.
        """
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise StoreError(f"{directory} is a file: give the name of a folder") from None
        store = cls(directory, manifest, lock_folder(directory))
        try:
            store._prepare(overwrite)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, directory: str | Path) -> EmbeddingStore:
        """Open a finished store for reading.

        Raises:
            StoreError: there is none, or shards are missing or damaged; the remedy is named.
        """
        directory = Path(directory)
        if not (directory / _MANIFEST).is_file():
            raise StoreError(
                f"{directory} has no {_MANIFEST}: it is not an embedding store; "
                f"write one with: ume embed ITEMS.jsonl -o {directory}",
                kind=ErrorKind.NOT_FOUND,
            )
        store = cls(directory, _read_manifest(directory))
        # The numbers themselves are checked as they are read, so that they are read only once.
        missing = store.num_shards - sum(map(store.has, store._written()))
        if missing:
            raise StoreError(
                f"{directory} is not finished: {missing} of {store.num_shards} shards are "
                "missing or damaged; run the same command again, it goes on from there"
            )
        return store

    @classmethod
    def attach(cls, directory: str | Path) -> EmbeddingStore:
        """Open a store that was begun, finished or not, beside the process that holds it.

        Several processes may write different shards of one store this way; the one that ``begin``
        gave it to keeps others out.

        Raises:
            StoreError: there is none, or its manifest is damaged.
        """
        directory = Path(directory)
        if not (directory / _MANIFEST).is_file():
            raise StoreError(
                f"{directory} has no {_MANIFEST}: it is not an embedding store",
                kind=ErrorKind.NOT_FOUND,
            )
        return cls(directory, _read_manifest(directory))

    @property
    def num_shards(self) -> int:
        """Shards of the finished store."""
        return -(-self.manifest.num_items // self.manifest.shard_size)

    def item_range(self, shard: int) -> range:
        """Positions of the items of a shard."""
        start = shard * self.manifest.shard_size
        return range(start, min(start + self.manifest.shard_size, self.manifest.num_items))

    def pending(self) -> list[int]:
        """Numbers of the shards that are missing, incomplete, damaged, or do not fit the manifest.

        Every byte of the shards is read.
        """
        return [shard for shard in range(self.num_shards) if self._load(shard) is None]

    def least_bytes(self, items: int) -> int:
        """Bytes that so many items take at least: their embeddings and positions."""
        return items * (self.manifest.hidden_size * _EMBEDDING_BYTES + _ROW_BYTES)

    def has(self, shard: int) -> bool:
        """Whether the files of a shard are there and fit together; the numbers are not read."""
        return self._listing(shard) is not None

    def write(self, shard: int, content: Shard) -> None:
        """Write one shard; when this returns, it survives a crash.

        Raises:
            StoreError: rows are missing or an embedding is not finite; nothing is written.
            OSError: the disk is full or not writable.
        """
        self._check(shard, content)
        tensors = {
            "embeddings": content.embeddings.contiguous(),
            "rows": content.rows.contiguous(),
        }
        sidecar = {
            "tensors_sha256": {name: _tensor_digest(value) for name, value in tensors.items()},
            "items": [record.to_json() for record in content.records],
            "skipped": [vars(skipped) for skipped in content.skipped],
        }
        listing = _json_bytes(sidecar)
        write_atomically(self._path(shard, "json"), listing)
        # One entry only: the library writes several in no fixed order, and the bytes would vary.
        metadata = {"items_sha256": hashlib.sha256(listing).hexdigest()}
        write_atomically(self._path(shard, "safetensors"), tensors_to_bytes(tensors, metadata))

    def read(self, shard: int) -> Shard:
        """One finished shard.

        Raises:
            StoreError: it is missing or damaged, were it one flipped bit; the remedy is named.
        """
        path = self._path(shard, "safetensors")
        content = self._load(shard)
        if content is None:
            raise StoreError(
                f"{path} is missing or damaged; run the same command again, "
                "it makes this shard anew"
            )
        return content

    def shards(self) -> Iterator[Shard]:
        """All shards in order."""
        return (self.read(shard) for shard in range(self.num_shards))

    def skipped(self) -> list[Skipped]:
        """All items without an embedding, of the shards that are done."""
        return [
            skipped
            for shard in self._written()
            if (listing := self._listing(shard)) is not None
            for skipped in listing.skipped
        ]

    def locate(self, media: str) -> Path:
        """The file of a media path of a record; the first candidate if none exists."""
        folders = [self.directory / folder for folder in self.manifest.media_folders] or [Path()]
        candidates = [folder / media for folder in folders]
        return next((path for path in candidates if path.is_file()), candidates[0])

    def close(self) -> None:
        """Let other processes write to the folder."""
        unlock_folder(self.directory, self._lock)
        self._lock = None

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _written(self) -> list[int]:
        """Shards whose files are there, in order: a damaged manifest may tell of any number."""
        names = self.directory.glob(f"shard-*-of-{self.num_shards:05d}.safetensors")
        numbers = {int(path.name.split("-")[1]) for path in names if path.name[6].isdigit()}
        return sorted(number for number in numbers if number < self.num_shards)

    def _fills(self, shard: int, rows: Sequence[int]) -> bool:
        """Whether ``rows`` are the positions of the items of a shard, each once."""
        span = self.item_range(shard)
        return len(rows) == span.stop - span.start and sorted(rows) == list(span)

    def _path(self, shard: int, suffix: str) -> Path:
        return self.directory / f"shard-{shard:05d}-of-{self.num_shards:05d}.{suffix}"

    def _prepare(self, overwrite: bool) -> None:
        remove_leftovers(self.directory, "shard-")
        remove_leftovers(self.directory, _MANIFEST)
        path = self.directory / _MANIFEST
        # Tensors before listings, so that a stop in between leaves no shard that looks done.
        names = filter(_SHARD_NAME.fullmatch, os.listdir(self.directory))
        shards = [self.directory / name for name in sorted(names, key=lambda n: n.endswith("json"))]
        if overwrite:
            for old in [*shards, path]:
                old.unlink(missing_ok=True)
        elif path.exists():
            differences = _read_manifest(self.directory).differences(self.manifest)
            if differences:
                raise StoreError(
                    f"{self.directory} holds embeddings made with other settings:\n  "
                    + "\n  ".join(differences),
                    remedy="choose another folder with -o, or replace them with --overwrite",
                    kind=ErrorKind.OTHER_SETTINGS,
                )
            return
        elif shards:
            raise StoreError(
                f"{self.directory} has shards but no {_MANIFEST}",
                remedy="choose another folder with -o, or replace them with --overwrite",
            )
        write_atomically(path, _json_bytes(self.manifest.to_json()))

    def _check(self, shard: int, content: Shard) -> None:
        rows = [*content.rows.tolist(), *(skipped.row for skipped in content.skipped)]
        if not self._fills(shard, rows):
            raise StoreError(f"shard {shard} must hold or skip every item of its range once")
        wanted = (len(content.records), self.manifest.hidden_size)
        if content.embeddings.shape != wanted or content.embeddings.dtype != torch.float32:
            raise StoreError(
                f"shard {shard} must be float32 {list(wanted)}, got {content.embeddings.dtype} "
                f"{list(content.embeddings.shape)}"
            )
        finite = content.embeddings.isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = content.records[int(finite.logical_not().nonzero()[0, 0])]
            raise StoreError(
                f"the embedding of item {bad.id!r} is not finite: the weights hold NaN or "
                "infinity, or the dtype is too narrow; try --dtype float32",
                kind=ErrorKind.NOT_FINITE,
            )

    def _listing(self, shard: int) -> _Listing | None:
        """What the JSON of a shard says if its files fit together, else None.

        The embeddings themselves are not read.
        """
        files = (self._path(shard, "json"), self._path(shard, "safetensors"))
        if not all(path.is_file() for path in files):  # a pipe, say, would be waited for
            return None
        try:
            listing = files[0].read_bytes()
            with safe_open(files[1], framework="pt") as tensors:
                digest = (tensors.metadata() or {}).get("items_sha256")
                if digest != hashlib.sha256(listing).hexdigest():
                    return None
                shape = tensors.get_slice("embeddings").get_shape()
                kinds = [tensors.get_slice(name).get_dtype() for name in ("embeddings", "rows")]
                rows = tensors.get_tensor("rows").tolist()
            value = parse(listing)
            records = [Record.from_json(item) for item in value["items"]]
            skipped = [Skipped(**item) for item in value["skipped"]]
            digests = {name: str(value["tensors_sha256"][name]) for name in ("embeddings", "rows")}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        fits = (
            kinds == ["F32", "I64"]
            and shape == [len(records), self.manifest.hidden_size]
            and self._fills(shard, [*rows, *(entry.row for entry in skipped)])
        )
        return _Listing(records, skipped, digests) if fits else None

    def _load(self, shard: int) -> Shard | None:
        listing = self._listing(shard)
        if listing is None:
            return None
        try:
            with safe_open(self._path(shard, "safetensors"), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in listing.digests}
        except (OSError, SafetensorError):
            return None
        if {name: _tensor_digest(value) for name, value in tensors.items()} != listing.digests:
            return None
        return Shard(tensors["rows"], tensors["embeddings"], listing.records, listing.skipped)


def _read_manifest(directory: Path) -> Manifest:
    path = directory / _MANIFEST
    try:
        value = read_object(path)
    except ValueError as error:
        raise StoreError(f"{path}: {error}: replace the store with --overwrite") from None
    return Manifest.from_json(value, path)


def _tensor_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode(errors="surrogatepass")


def lock_folder(directory: Path) -> int | None:
    """Hold the folder for this process; released by the system when it ends, however it ends.

    A file in it is locked and says who holds it: on NFS, locks of folders do not reach other hosts.
    A process that is killed leaves the file behind, which is no obstacle to the next one.

    Returns:
        What ``unlock_folder`` takes; None where nothing can be locked: on Windows, in a folder that
        cannot be written, and, with a warning, on a file system without locks.

    Raises:
        StoreError: another process holds it.
        OSError: the folder can be written, but not this file in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two writers are the user's own care there
        return None
    path = directory / LOCK_FILE
    while True:
        try:
            # O_SYNC: other hosts, too, can read at once who it is.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o666)
        except OSError:
            if os.access(directory, os.W_OK):
                raise
            return None  # nobody can write there; whoever tries is told by the first file
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 1024, 0).decode(errors="replace")
            os.close(lock)
            raise StoreError(
                f"another process is writing to {directory} ({holder.strip()}): wait for it",
                kind=ErrorKind.HELD,
            ) from None
        except OSError as error:
            os.close(lock)
            if error.errno == errno.ESTALE:  # removed on another host
                continue
            path.unlink(missing_ok=True)
            warnings.warn(
                f"files cannot be locked in {directory} ({error.strerror}): make sure that no "
                "other process writes there",
                stacklevel=2,
            )
            return None
        if _is_at(path, lock):
            break
        os.close(lock)  # its holder removed it in between, and the next one makes another file
    with suppress(OSError):  # a full disk: the name is only for the reader of a message
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    return lock


def unlock_folder(directory: Path, lock: int | None) -> None:
    """Let other processes have the folder; ``lock`` is what ``lock_folder`` returned."""
    if lock is None:
        return
    path = directory / LOCK_FILE
    with suppress(OSError):  # a file that stays is no obstacle
        if _is_at(path, lock):
            path.unlink()  # while it is held: nobody else can hold a file of this name
    os.close(lock)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        named = os.open(path, os.O_RDONLY)  # unlike stat, asks the server of a network file system
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(named), os.fstat(descriptor))
    finally:
        os.close(named)
