"""Errors a user can act on: each names the file or item at fault and the remedy."""

from __future__ import annotations


class UmeError(Exception):
    """Base class of every error this package raises on purpose."""


class CheckpointError(UmeError):
    """A checkpoint is missing a file, is truncated, or does not fit the architecture."""


class CapacityError(UmeError):
    """A prompt does not fit the position range or the KV arena."""


class StoreError(UmeError):
    """An embedding store on disk is incomplete or was written with other settings."""


class DataError(UmeError):
    """Benchmark data are missing, unreadable, or not in the layout their task is published in."""


class PatchError(UmeError):
    """A model or a repository cannot be patched as asked; nothing was changed."""


class ItemError(UmeError):
    """One input item cannot be embedded.

    Args:
        reason: what is wrong and what to do about it.
        index: position of the item in the caller's sequence, if known.
        id: the item's own id, if it has one.
    """

    def __init__(self, reason: str, index: int | None = None, id: str | None = None) -> None:
        self.reason = reason
        self.index = index
        self.id = id
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "item" if self.index is None else f"item {self.index}"
        if self.id:
            where += f" (id {self.id!r})"
        return f"{where}: {self.reason}"
