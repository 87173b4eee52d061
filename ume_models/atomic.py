"""Files that exist completely or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = ".partial"
_TOKEN_BYTES = 8
_ANY_TOKEN = "[0-9a-f]" * (2 * _TOKEN_BYTES)
_ABANDONED_SECONDS = 3600.0  # since the last byte: nobody writes it any more


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that becomes ``path`` when the block ends well.

    A reader sees the old file or the new one, never half of it. The bytes are flushed to the disk
    before the name changes in one step; the folder is flushed last, so a following write cannot
    overtake it. When the block raises, ``path`` is unchanged and the temporary file is gone.
    Several processes, of several hosts too, may do so at once: the last one's file stays, whole.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is named.
    """
    for old in _temporaries(path.parent, glob.escape(path.name)):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                old.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}{_TEMPORARY}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, mode)  # some writers make files that only their owner can read
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first error tells more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # A full disk is noticed by calls that know no name; the other name is not the user's.
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, all of it or nothing; errors as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Delete the temporary files of interrupted writes of files whose name begins so.

    A write that goes on fails by it: call this only where no other process writes such files.
    """
    for leftover in _temporaries(folder, f"{glob.escape(prefix)}*"):
        leftover.unlink(missing_ok=True)


def _temporaries(folder: Path, name: str) -> Iterator[Path]:
    return folder.glob(f".{name}.{_ANY_TOKEN}{_TEMPORARY}")


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
