"""Parquet and arrow files, read in pieces: needs pyarrow."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ume_models.errors import DataError
from ume_models.mmeb.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 64
# Pages of documents are 0.1 to 2 MB, and a file's row groups may hold gigabytes of them.
_CELLS_AT_ONCE = 16
_CACHE_BYTES = 256 * 2**20


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, OverflowError, ValueError) as error:
        # KeyError: a column that is there twice, or not in this file. The last two: times and
        # dates that Python's own types cannot hold.
        raise DataError(f"{path} cannot be read ({error}); get the file again") from None


class ParquetTable(Table):
    """Parquet files; cells come through a cache of bounded size.

    Args:
        files: files with the same columns.
        cache_bytes: size of the cache; one run of cells is kept whatever its size.

    Raises:
        DataError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int = _CACHE_BYTES) -> None:
        import pyarrow.parquet as pq

        self.files = list(files)
        self._cache_bytes = cache_bytes
        self._groups: list[tuple[Path, int]] = []  # file and number of every row group
        self._starts = [0]  # its first row, and at the end the number of rows
        names: dict[str, None] = {}
        for path in self.files:
            with _reading(path), pq.ParquetFile(path) as file:
                names |= dict.fromkeys(file.schema_arrow.names)
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if rows:
                        self._groups.append((path, group))
                        self._starts.append(self._starts[-1] + rows)
        self.columns = list(names)
        self._lock = threading.Lock()
        # Runs of cells by column and first row, and where each cached cell is: its run's first row.
        self._cache: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()
        self._firsts: dict[tuple[str, int], int] = {}
        self._cached = 0
        self._stream: tuple[str, int, Iterator[pa.RecordBatch]] | None = None
        self._next = 0  # the row that the stream gives next

    def __len__(self) -> int:
        return self._starts[-1]

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        for path in self.files:
            with _reading(path), pq.ParquetFile(path) as file:
                wanted = [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                    yield from _dicts(batch, columns)

    def cell(self, row: int, column: str) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        path, _ = self._groups[bisect_right(self._starts, row) - 1]
        with self._lock, _reading(path):
            first = self._firsts.get((column, row))
            if first is not None:
                self._cache.move_to_end((column, first))
                return self._cache[column, first][row - first].as_py()
            return self._read_up_to(row, column)

    def _read_up_to(self, row: int, column: str) -> Any:
        """Read on to a row of its group, from the group's beginning if the stream is past it."""
        import pyarrow.parquet as pq

        group = bisect_right(self._starts, row) - 1
        path, number = self._groups[group]
        if self._stream is None or self._stream[:2] != (column, group) or self._next > row:
            file = pq.ParquetFile(path, buffer_size=2**20)
            batches = file.iter_batches(_CELLS_AT_ONCE, row_groups=[number], columns=[column])
            self._stream, self._next = (column, group, batches), self._starts[group]
        for batch in self._stream[2]:
            first, values = self._next, batch.column(column)
            self._keep((column, first), values)
            self._next += len(values)
            if row < self._next:
                return values[row - first].as_py()
        raise DataError(f"{path} has fewer rows than it says; get the file again")

    def _keep(self, key: tuple[str, int], values: pa.Array) -> None:
        self._forget(key)
        self._cache[key] = values
        self._cached += values.nbytes
        column, first = key
        self._firsts |= {(column, first + at): first for at in range(len(values))}
        while self._cached > self._cache_bytes and len(self._cache) > 1:
            self._forget(next(iter(self._cache)))

    def _forget(self, key: tuple[str, int]) -> None:
        values = self._cache.pop(key, None)
        if values is not None:
            self._cached -= values.nbytes
            for at in range(len(values)):
                self._firsts.pop((key[0], key[1] + at), None)


class ArrowTable(Table):
    """Files of ``Dataset.save_to_disk``, mapped into memory.

    Raises:
        DataError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa

        self.files = list(files)
        self._tables: list[pa.Table] = []
        self._starts = [0]
        for path in self.files:
            with _reading(path):
                source = pa.memory_map(str(path))
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
                self._tables.append(opened.read_all())
            self._starts.append(self._starts[-1] + len(self._tables[-1]))
        names = [name for table in self._tables for name in table.column_names]
        self.columns = list(dict.fromkeys(names))

    def __len__(self) -> int:
        return self._starts[-1]

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for path, table in zip(self.files, self._tables, strict=True):
            wanted = [name for name in columns if name in table.column_names]
            with _reading(path):
                for batch in table.select(wanted).to_batches(max_chunksize=_ROWS_AT_ONCE):
                    yield from _dicts(batch, columns)

    def cell(self, row: int, column: str) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect_right(self._starts, row) - 1
        with _reading(self.files[number]):
            return self._tables[number].column(column)[row - self._starts[number]].as_py()


def _dicts(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    present = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    nothing = [None] * len(batch)
    lists = [present.get(name, nothing) for name in columns]
    for values in zip(*lists, strict=True):
        yield dict(zip(columns, values, strict=True))
