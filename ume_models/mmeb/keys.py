"""Names for what is embedded: equal content, equal key, whatever the task or the place.

A key covers the text and the bytes of every picture, so a changed file or prompt gives another key
and a stale embedding cannot be found under it. Reading every file once is cheap beside decoding
it; digests of files are kept with their size and time, so that a resumed run reads only what is
new or has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ume_models.atomic import write_atomically
from ume_models.processing import prefetch
from ume_models.processing.items import Item, MediaSource

Kind = Literal["text", "image", "video"]
KINDS: tuple[Kind, ...] = ("text", "image", "video")
_DIGEST_BYTES = 20
_WORTH_THREADS = 64


@dataclass(frozen=True)
class _Known:
    """A file as it was when its digest was taken; any change of it moves one of these."""

    size: int
    modified: int
    changed: int
    inode: int
    digest: str

    def is_of(self, found: os.stat_result) -> bool:
        return (self.size, self.modified, self.changed, self.inode) == _state(found)


class ContentKeys:
    """Keys of items; remembers the digests of files.

    Args:
        cache: file in which digests are kept between runs, None for none; a damaged one is made
            anew.
        root: paths below it are remembered relative to it.
        workers: threads that read files.
    """

    def __init__(self, cache: Path | None, root: Path, workers: int = 8) -> None:
        self._cache = cache
        self._root = str(root.absolute()) + os.sep
        self._workers = workers
        self._known = {} if cache is None else _read_cache(cache)
        self._changed = False
        self._missing: dict[str, None] = {}

    @property
    def missing(self) -> Sequence[str]:
        """Files that items name and that could not be read."""
        return list(self._missing)

    def keys(self, item: Callable[[int], Item], count: int) -> list[str]:
        """One key, ``kind-hex``, for each of ``item(0)`` … ``item(count - 1)``.

        Few items are in memory at a time. A file that cannot be read gets a name of its own, so
        that embedding comes to the item and says what is wrong.
        """
        return list(
            prefetch(
                lambda position: self._key(item(position)),
                range(count),
                self._workers if count >= _WORTH_THREADS else 0,
                4 * max(1, self._workers),
            )
        )

    def save(self) -> None:
        """Write the digests of files to the disk."""
        if self._changed and self._cache is not None:
            files = {name: [*vars(known).values()] for name, known in sorted(self._known.items())}
            content = {"check": _check(files), "files": files}
            write_atomically(self._cache, json.dumps(content, separators=(",", ":")).encode())
            self._changed = False

    def _key(self, item: Item) -> str:
        state = hashlib.blake2b(digest_size=16)
        for part in (item.instruction, item.text):
            encoded = part.encode(errors="surrogatepass")
            state.update(len(encoded).to_bytes(8, "little") + encoded)
        state.update(b"video" if item.video is not None else b"image")
        for source in item.images if item.video is None else item.video:
            state.update(bytes.fromhex(self._digest(source)))
        return f"{item_kind(item)}-{state.hexdigest()}"

    def _digest(self, source: MediaSource) -> str:
        if isinstance(source, bytes):
            return _digest_of(source)
        if isinstance(source, Image.Image):
            held = io.BytesIO()
            source.save(held, format="PNG")
            return _digest_of(held.getvalue())
        path = os.path.abspath(source)
        name = path.removeprefix(self._root)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # a pipe may never end
                raise OSError("not a file")
            known = self._known.get(name)
            if known and known.is_of(found):
                return known.digest
            digest = _digest_of(Path(path).read_bytes())
        except (OSError, ValueError):  # a name may hold what no file's can
            self._missing[path] = None
            return _digest_of(b"missing: " + os.fsencode(name))
        self._known[name] = _Known(*_state(found), digest)
        self._changed = True
        return digest


def item_kind(item: Item) -> Kind:
    """Which class of input an item belongs to; a document page is an image."""
    if item.video is not None:
        return "video"
    return "image" if item.images else "text"


def key_kind(key: str) -> Kind:
    """The class of input in a key."""
    kind = key.partition("-")[0]
    return next(known for known in KINDS if known == kind)


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _check(files: dict[str, list[int | str]]) -> str:
    return _digest_of(json.dumps(files, separators=(",", ":")).encode())


def _read_cache(path: Path) -> dict[str, _Known]:
    try:
        content = json.loads(path.read_bytes())
        if content["check"] != _check(content["files"]):
            return {}
        return {str(name): _Known(*row) for name, row in content["files"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}
