"""Errors a user can act on: each names the file or item at fault and the remedy.

Nobody decides by the wording of a message: what callers and servers tell apart is the ``kind``.
"""

from __future__ import annotations

from enum import Enum


class ErrorKind(Enum):
    """What is wrong: a name for machines, and the HTTP status a server answers with.

    4xx where the sender can mend the request, 5xx where only who runs the server can.
    """

    status: int

    def __new__(cls, name: str, status: int) -> ErrorKind:
        kind = object.__new__(cls)
        kind._value_ = name
        kind.status = status
        return kind

    OPTION = "option", 400  # an option is unknown or out of range, whatever the items are
    NOT_FOUND = "not_found", 404  # no checkpoint, store or index of that name
    OTHER_SETTINGS = "other_settings", 409  # in conflict with what was stored before
    TOO_LONG = "too_long", 413  # more tokens than the model has positions
    TOO_LARGE = "too_large", 413  # more pixels than the limit against bombs lets be decoded
    BAD_ITEM = "bad_item", 422  # well-formed JSON, but nothing that can be embedded
    NEEDS_CHOICE = "needs_choice", 422  # several images, and no word on what to do with them
    HELD = "held", 423  # another process writes there; the same request succeeds later
    FAILED = "failed", 500  # nothing the sender could change, and none of the others
    DAMAGED = "damaged", 500  # a file of the server's is missing, incomplete or of another format
    NOT_FINITE = "not_finite", 500  # weights or number format, not the item, make NaN
    OUT_OF_MEMORY = "out_of_memory", 507  # not 503: the same item, sent again, fails again
    NO_SPACE = "no_space", 507  # the disk is full


class UmeError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        message: what is wrong and, without ``remedy``, what to do.
        remedy: what to do, where a caller may have another one to name.
        kind: what is wrong, where it is not what the class stands for.
    """

    kind = ErrorKind.FAILED

    def __init__(
        self, message: str = "", *, remedy: str = "", kind: ErrorKind | None = None
    ) -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        if kind is not None:
            self.kind = kind


class OptionError(UmeError, ValueError):
    """An option is unknown or out of range."""

    kind = ErrorKind.OPTION


class UnknownOptionError(OptionError, TypeError):
    """An option does not exist, or not for this family of models."""


class CheckpointError(UmeError):
    """A checkpoint is missing a file, is truncated, or does not fit the architecture."""

    kind = ErrorKind.DAMAGED


class StructureError(UmeError):
    """A layer of a loaded model was wrapped, replaced or hooked: the engine would not see it."""


class CapacityError(UmeError):
    """A prompt does not fit the position range or the KV arena."""

    kind = ErrorKind.TOO_LONG


class StoreError(UmeError):
    """An embedding store on disk is incomplete or was written with other settings."""

    kind = ErrorKind.DAMAGED


class DataError(UmeError):
    """Benchmark data are missing, unreadable, or not in the layout their task is published in.

    Args:
        message: what is wrong and what to do about it.
        task: name of the task, which then precedes the message.
    """

    kind = ErrorKind.DAMAGED

    def __init__(self, message: str = "", *, task: str = "") -> None:
        super().__init__(f"{task}: {message}" if task else message)
        self.message = message


class PatchError(UmeError):
    """A model or a repository cannot be patched as asked; nothing was changed."""


class ItemError(UmeError):
    """One input item cannot be embedded.

    Args:
        reason: what is wrong and what to do about it.
        index: position of the item in the caller's sequence, if known.
        id: the item's own id, if it has one.
        kind: as in ``UmeError``.
    """

    kind = ErrorKind.BAD_ITEM

    def __init__(
        self,
        reason: str,
        index: int | None = None,
        id: str | None = None,
        *,
        kind: ErrorKind | None = None,
    ) -> None:
        self.reason = reason
        self.index = index
        self.id = id
        super().__init__(reason, kind=kind)

    def at(self, index: int | None, id: str | None = None, reason: str = "") -> ItemError:
        """The same error, said of the item at another place, or in other words."""
        return ItemError(reason or self.reason, index, id, kind=self.kind)

    def __str__(self) -> str:
        where = "item" if self.index is None else f"item {self.index}"
        if self.id:
            where += f" (id {self.id!r})"
        return f"{where}: {self.reason}"
