"""Items as JSON Lines: checked as a whole before any work, then read piece by piece.

A pipe, a folder and a query on the command line become such lines in a temporary file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ume_models.cli.options import OnError
from ume_models.cli.terminal import tell
from ume_models.errors import ItemError, UmeError
from ume_models.processing.items import Item, parse_item
from ume_models.store import Record

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_TEXTS = (".md", ".txt")
_CLIPS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_PAGES = (".doc", ".docx", ".epub", ".odt", ".pdf", ".ppt", ".pptx", ".ps")
_SHOWN = 5


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
    """Items of a JSON Lines file; ``open_items`` makes one of other sources.

    Attributes:
        name: the file, or what its lines were made of, for messages.
        folder: absolute path of the folder that media paths are relative to.
        digest: SHA-256 of the lines.
    """

    def __init__(
        self,
        path: str | Path,
        on_error: OnError = "stop",
        *,
        when_changed: str = "restore it or start again with --overwrite",
        name: str = "",
        folder: Path | None = None,
        listed: bool = False,
    ) -> None:
        """Read the file once and check every line; only its position and a digest are kept.

        An item without an id gets the number of its line.

        Args:
            path: UTF-8, one JSON object per line; empty lines are ignored.
            on_error: "skip" keeps lines that are not valid items, to be listed as skipped.
            when_changed: the remedy to name when the file turns out to have changed later.
            name: of the source, where it is not the file.
            folder: that media paths are relative to, where it is not the file's.
            listed: the lines were made of the source, so that messages name ids, not lines.

        Raises:
            UmeError: a line is not a valid item (with "stop"), two items have one id, or there
                are no items; the line is named.
            OSError: the file cannot be read.
        """
        self._path = Path(path)
        self.name = name or str(path)
        self.folder = (folder or self._path.parent).absolute()
        self._when_changed = when_changed
        self._listed = listed
        self._lines: list[_Line] = []
        self._spool: Any = None
        digest = hashlib.sha256()
        seen: dict[str, int] = {}
        offset = 0
        with open(self._path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                digest.update(raw)
                line = _Line(number, offset, len(raw), str(number), _line_digest(raw))
                offset += len(raw)
                if not raw.removeprefix(_BYTE_ORDER_MARK).strip():
                    continue
                found = self._parse(raw, line, len(self._lines))
                line = replace(line, id=found.record.id)
                if found.problem and on_error == "stop":
                    raise UmeError(
                        f"{self._place(line)}: {found.problem} "
                        "(--on-error skip leaves such items out)"
                    )
                if line.id in seen:
                    raise UmeError(
                        f"{self.name}: lines {seen[line.id]} and {number} have the same id "
                        f"{line.id!r}; results could not be told apart: give every item an id of "
                        "its own"
                    )
                seen[line.id] = number
                self._lines.append(line)
        if not self._lines:
            raise UmeError(
                f"{self.name} has no items: "
                + ("pictures and text files are" if listed else "one JSON object per line is")
                + " expected"
            )
        self.digest = digest.hexdigest()

    @classmethod
    def spooled(cls, lines: Iterable[bytes], name: str, folder: Path, **options: Any) -> ItemsFile:
        """The items of lines that can be read once only.

        Raises:
            UmeError, OSError: as for a file; or there is no room for the temporary one.
        """
        spool = tempfile.NamedTemporaryFile(prefix="ume-items-")  # noqa: SIM115 - ends with these
        spool.writelines(lines)
        spool.flush()
        items = cls(spool.name, name=name, folder=folder, **options)
        items._spool = spool
        return items

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        """Place of an item for a message."""
        line = self._lines[row]
        return self._place(line) + ("" if self._listed else f" (id {line.id!r})")

    def read(self, rows: Iterable[int]) -> list[FileItem]:
        """Read some items again.

        Raises:
            UmeError: a line is not what it was at first, so that rows and ids would be mixed up.
            OSError: the file cannot be read any more.
        """
        with open(self._path, "rb") as handle:
            found = []
            for row in rows:
                line = self._lines[row]
                handle.seek(line.offset)
                raw = handle.read(line.length)
                if _line_digest(raw) != line.digest:
                    raise UmeError(
                        f"{self.name} changed while it was being embedded "
                        f"(line {line.number}); {self._when_changed}"
                    )
                found.append(self._parse(raw, line, row))
            return found

    def _place(self, line: _Line) -> str:
        return f"{self.name}, {line.id if self._listed else f'line {line.number}'}"

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
            item = parse_item(fields, row, self.folder)
        except ItemError as error:
            return FileItem(row, None, Record(id=error.id or default.id), error.reason)
        return FileItem(row, item, _record(item.id, fields))


def open_items(source: str, *, leave_out: Path | None = None, **options: Any) -> ItemsFile:
    """Items of a JSON Lines file, of a pipe, of standard input or of a folder.

    Args:
        source: a path, or "-" for standard input. Of a folder, pictures and text files are items
            with their paths in it as ids; other files are named and left out.
        leave_out: a folder below that is not looked into.
        options: ``on_error`` and ``when_changed`` of ``ItemsFile``.

    Raises:
        UmeError, OSError: as ``ItemsFile``; or the file is a picture, a clip or a document.
    """
    if not source:
        raise UmeError("the name of the items is empty; give a file, a folder or -")
    path = Path(source)
    if source in ("-", "/dev/stdin"):
        if sys.stdin is None:
            raise UmeError("standard input is closed; give a file of items")
        return ItemsFile.spooled(sys.stdin.buffer, "standard input", Path(), **options)
    if path.is_fifo():
        with open(path, "rb") as pipe:
            return ItemsFile.spooled(pipe, source, Path(), **options)
    if path.is_dir():
        lines = _lines_of_folder(path, leave_out)
        return ItemsFile.spooled(lines, source, path, listed=True, **options)
    suffix = path.suffix.lower()
    if suffix in (*_PICTURES, *_CLIPS, *_PAGES) and path.exists():
        remedy = _remedies([suffix]) or f'give its folder, or a line {{"image": "{path.name}"}}'
        raise UmeError(f"{source} is not a JSON Lines file of items; {remedy}")
    return ItemsFile(path, **options)


def query_item(text: str, image: Path | None) -> ItemsFile:
    """One query from the command line, of a text, a picture or both.

    Raises:
        UmeError: it is not a valid item.
    """
    fields = {"id": "query", "text": text, "image": None if image is None else str(image)}
    line = json.dumps(fields).encode()
    return ItemsFile.spooled([line], "command line", Path(), listed=True)


def _lines_of_folder(folder: Path, leave_out: Path | None) -> Iterator[bytes]:
    """Pictures and texts in order of their paths; what else there is is told at the end."""
    others: list[str] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders
            if name[0] != "." and (leave_out is None or not _same(Path(root, name), leave_out))
        )  # fmt: skip
        for name in sorted(name for name in names if name[0] != "."):
            path = Path(root, name)
            id, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
            fields = {"id": id, "image": id} if suffix in _PICTURES else None
            if suffix in _TEXTS and path.is_file():
                try:
                    fields = {"id": id, "text": path.read_text(encoding="utf-8-sig")}
                except UnicodeDecodeError:
                    id += " (not UTF-8)"
            if fields is not None:
                yield json.dumps(fields).encode() + b"\n"
            else:
                others.append(id)
    if others:
        more = f" and {len(others) - _SHOWN} more" * (len(others) > _SHOWN)
        remedies = _remedies({Path(other).suffix.lower() for other in others})
        tell(
            f"{folder}: left out, being neither pictures nor texts: {', '.join(others[:_SHOWN])}"
            f"{more}" + f"; {remedies}" * bool(remedies)
        )


def _remedies(suffixes: Iterable[str]) -> str:
    """What to do with files of kinds that are no items by themselves."""
    kinds = (
        (_PAGES, "documents come later: make a picture of each page and give their folder"),
        (_CLIPS, 'clips come later: list a clip\'s frames as "video" of a JSON line'),
    )
    return "; ".join(remedy for kind, remedy in kinds if {*kind} & {*suffixes})


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


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
