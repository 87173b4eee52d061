"""What a table is, whatever its files are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ume_models.errors import DataError


class Table(ABC):
    """Rows of one or several files of one layout.

    Attributes:
        files: the files, in order.
        columns: names of the columns.
    """

    files: Sequence[Path]
    columns: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def cell(self, row: int, column: str) -> Any:
        """One value. Neighbouring rows are cheap; safe to call from several threads.

        Raises:
            DataError: a file is damaged.
        """

    @abstractmethod
    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]: ...

    def rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """All rows in order, reduced to these columns; other columns are not read.

        Raises:
            DataError: a column is missing, or a file is damaged.
        """
        self.require(*columns)
        return self._rows(columns)

    def require(self, *columns: str) -> None:
        """Raise DataError if a column is missing."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise DataError(
                f"{self.files[0]} has no column {', '.join(map(repr, missing))} (it has "
                f"{', '.join(map(repr, self.columns))}): it is not in the layout that this "
                "benchmark is published in; get it again"
            )
