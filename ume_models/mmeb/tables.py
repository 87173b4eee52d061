"""Tables in files: only the columns asked for are read, and single cells out of large ones."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.table import Table
from ume_models.processing.items import MediaSource

# As the hub's readers see them; int() would also take "1_1".
_INTEGER = re.compile(r"-?[0-9]+")


def open_table(files: Sequence[Path]) -> Table:
    """Open files of one kind as one table; large parquet and arrow files stay on the disk.

    Args:
        files: parquet, arrow (``save_to_disk``), jsonl, json (a list of objects, or one object per
            line) or csv.

    Raises:
        DataError: files are of several kinds, of an unknown one, or damaged; or pyarrow, which
            parquet and arrow need, is not installed.
    """
    kinds = {path.suffix for path in files}
    if len(kinds) != 1:
        raise DataError(
            f"tables of several kinds: {', '.join(map(str, files))}; keep those of one kind"
        )
    kind = kinds.pop()
    if kind in (".jsonl", ".json", ".csv"):
        read = _read_csv if kind == ".csv" else _read_json
        return _RowTable(files, [row for path in files for row in read(path)])
    if kind not in (".parquet", ".arrow"):
        raise DataError(f"{files[0]} is not a parquet, arrow, jsonl, json or csv file; convert it")
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"reading {files[0]} needs pyarrow, which is not installed: `pip install pyarrow`"
        )
    from ume_models.mmeb.arrow_tables import ArrowTable, ParquetTable

    return ArrowTable(files) if kind == ".arrow" else ParquetTable(files)


def picture(cell: Any, folder: Path) -> MediaSource | None:
    """The picture in a cell: ``{"bytes": …, "path": …}``, bytes, or a path relative to ``folder``.

    None where the cell is empty.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    return folder / cell if isinstance(cell, str) and cell else None


class _RowTable(Table):
    """Rows in memory: files of text only, small against the media they name."""

    def __init__(self, files: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> None:
        self.files = list(files)
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self._values = rows

    def __len__(self) -> int:
        return len(self._values)

    def cell(self, row: int, column: str) -> Any:
        return self._values[row].get(column)

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for row in self._values:
            yield {name: row.get(name) for name in columns}


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    text = _text(path)
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON ({error}); get the file again") from None
    else:
        # Only line feeds end a line: texts may hold other separators that Unicode knows.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}, line {number}, is not JSON ({error}); get the file again"
                    ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{path}: row {number} is not an object with named columns; get the file again"
            )
    return rows


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        rows: list[dict[str, Any]] = list(reader)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}, is not CSV ({error}); get the file again"
        ) from None
    for name in reader.fieldnames or ():
        # A column of integers is one in every other kind of table.
        if all(_INTEGER.fullmatch(row[name] or "") for row in rows):
            for row in rows:
                row[name] = int(row[name])
    return list(rows)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); get the file again") from None
