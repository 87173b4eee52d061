"""Room on the disk, looked at before hours of work are spent on what will not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from ume_models.errors import ErrorKind, StoreError


def require_space(folder: Path, needed: int) -> None:
    """Check that a folder's file system has room.

    Args:
        folder: must exist.
        needed: bytes, no more than what will be written: nothing is refused that would fit.

    Raises:
        StoreError: there is less room; both figures are named.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some remote file systems tell no sizes
        raise StoreError(
            f"{folder} would get at least {_amount(needed)} more, and its disk has "
            f"{_amount(disk.free)} free: make room, or choose another folder with -o",
            kind=ErrorKind.NO_SPACE,
        )


def _amount(size: int) -> str:
    """Bytes in decimal units, as disks are sold: "1.5 GB", "12.0 MB"."""
    for unit, bytes_of_it in (("GB", 10**9), ("MB", 10**6)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:,.1f} {unit}"
    return f"{size / 1000:.1f} kB"
