"""The benchmarks that can be evaluated, by the name their tasks carry."""

from __future__ import annotations

from importlib import import_module

from ume_models.errors import DataError
from ume_models.mmeb.tasks import Task

# Module and name of each table.
_TABLES = {
    "MMEB-v2": ("mmeb_v2", "MMEB_V2"),
    "MMEB-v2-2026": ("mmeb_v2", "MMEB_V2_2026"),
    "MMEB-v1": ("mmeb_v1", "MMEB_V1"),
    "M-BEIR": ("mbeir", "MBEIR"),
}
BENCHMARKS = tuple(_TABLES)


def benchmark(name: str) -> tuple[Task, ...]:
    """The tasks of a benchmark; case does not matter.

    Raises:
        DataError: there is none of that name.
    """
    for known, (module, table) in _TABLES.items():
        if known.lower() == name.lower():
            tasks: tuple[Task, ...] = getattr(import_module(f"ume_models.mmeb.{module}"), table)
            return tasks
    raise DataError(f"unknown benchmark {name!r} (known: {', '.join(BENCHMARKS)})")
