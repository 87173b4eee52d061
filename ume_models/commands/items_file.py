"""A JSON Lines file of items: checked as a whole before any work, then read piece by piece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ume_models.errors import ItemError, UmeError
from ume_models.processing.items import Item, parse_item
from ume_models.store import Record

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class _Line:
    number: int
    offset: int
    length: int
    id: str
    digest: bytes


@dataclass(frozen=True)
class FileItem:
    """One item of the file.

    Attributes:
        row: position among the items of the file, from 0.
        item: the checked item, or None if it cannot be used.
        record: what is kept of it beside its embedding.
        problem: why it cannot be used, else empty.
    """

    row: int
    item: Item | None
    record: Record
    problem: str = ""


class ItemsFile:
    """Items of a JSON Lines file; media paths are relative to the folder of the file.

    Attributes:
        path: the file.
        digest: SHA-256 of its bytes.
    """

    def __init__(
        self,
        path: str | Path,
        on_error: Literal["stop", "skip"] = "stop",
        *,
        when_changed: str = "restore it or start again with --overwrite",
    ) -> None:
        """Read the file once and check every line; only its position and a digest are kept.

        An item without an id gets the number of its line.

        Args:
            path: UTF-8, one JSON object per line; empty lines are ignored.
            on_error: "skip" keeps lines that are not valid items, to be listed as skipped.
            when_changed: the remedy to name when the file turns out to have changed later.

        Raises:
            UmeError: a line is not a valid item (with "stop"), two items have one id, or there
                are no items; the line is named.
            OSError: the file cannot be read.
        """
        self.path = Path(path)
        self._when_changed = when_changed
        self._folder = self.path.absolute().parent
        self._lines: list[_Line] = []
        digest = hashlib.sha256()
        seen: dict[str, int] = {}
        offset = 0
        with open(self.path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                digest.update(raw)
                line = _Line(number, offset, len(raw), str(number), _line_digest(raw))
                offset += len(raw)
                if not raw.removeprefix(_BYTE_ORDER_MARK).strip():
                    continue
                found = self._parse(raw, line, len(self._lines))
                if found.problem and on_error == "stop":
                    raise UmeError(
                        f"{self.path}, line {number}: {found.problem} "
                        "(--on-error skip leaves such items out)"
                    )
                name = found.record.id
                if name in seen:
                    raise UmeError(
                        f"{self.path}: lines {seen[name]} and {number} have the same id {name!r}; "
                        "results could not be told apart: give every item an id of its own"
                    )
                seen[name] = number
                self._lines.append(replace(line, id=name))
        if not self._lines:
            raise UmeError(f"{self.path} has no items: one JSON object per line is expected")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def folder(self) -> Path:
        """Absolute path of the folder that media paths are relative to."""
        return self._folder

    def where(self, row: int) -> str:
        """Place of an item for a message."""
        return f"{self.path}, line {self._lines[row].number} (id {self._lines[row].id!r})"

    def read(self, rows: Iterable[int]) -> list[FileItem]:
        """Read some items again.

        Raises:
            UmeError: a line is not what it was at first, so that rows and ids would be mixed up.
            OSError: the file cannot be read any more.
        """
        with open(self.path, "rb") as handle:
            found = []
            for row in rows:
                line = self._lines[row]
                handle.seek(line.offset)
                raw = handle.read(line.length)
                if _line_digest(raw) != line.digest:
                    raise UmeError(
                        f"{self.path} changed while it was being embedded "
                        f"(line {line.number}); {self._when_changed}"
                    )
                found.append(self._parse(raw, line, row))
            return found

    def _parse(self, raw: bytes, line: _Line, row: int) -> FileItem:
        default = Record(id=str(line.number))
        try:
            fields = json.loads(raw.removeprefix(_BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            return FileItem(row, None, default, f"not valid JSON in UTF-8: {error}")
        if not isinstance(fields, dict):
            return FileItem(
                row, None, default, f"expected a JSON object, got {type(fields).__name__}"
            )
        if fields.get("id") is None:
            fields["id"] = default.id
        try:
            item = parse_item(fields, row, self._folder)
        except ItemError as error:
            return FileItem(row, None, Record(id=error.id or default.id), error.reason)
        return FileItem(row, item, _record(item.id, fields))


def _line_digest(raw: bytes) -> bytes:
    # Guards against accidents, for millions of lines: eight bytes each are enough and stay small.
    return hashlib.blake2b(raw, digest_size=8).digest()


def _record(name: str, fields: Mapping[str, Any]) -> Record:
    """The fields of a valid item that are worth keeping, with paths as they were written."""
    images = [fields["image"]] if fields.get("image") else fields.get("images") or []
    return Record(
        id=name,
        text=fields.get("text") or "",
        images=tuple(images),
        video=tuple(fields.get("video") or ()),
    )
