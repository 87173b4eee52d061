"""Files that the user names for results: devices, pipes and links stay what they are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import typer

from ume_models.atomic import write_atomically


def named_path(text: str) -> Path:
    """The value of an option as a path; an empty one would be the current folder.

    Raises:
        BadParameter: it is empty.
    """
    if not str(text):
        raise typer.BadParameter("is empty")
    return Path(text)


def refuse_folder(path: Path) -> None:
    """Raise early if results cannot be written to a path because it is a folder.

    Raises:
        OSError: ``path`` is a folder, or it cannot be looked at.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "is a folder; give the name of a file for the results", str(path)
        )


def write_output(path: Path, text: str) -> None:
    """Write results: a file completely or not at all, a device or pipe as it is.

    The target of a link is written and the link is kept. Missing folders are made.

    Raises:
        OSError: ``path`` is a folder, cannot be written, or the disk is full; it is named.
    """
    refuse_folder(path)
    data = text.encode(errors="surrogatepass")
    try:
        special = not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        special = False
    if special:  # a rename would put a plain file in the place of /dev/null
        _write_plainly(path, data)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, data)


def _write_plainly(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as handle:
            handle.write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
