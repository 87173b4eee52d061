"""``ume eval list``: the tasks of a benchmark."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ume_models.cli.eval.selection import selection_options
from ume_models.cli.options import takes


@takes(selection=selection_options)
def list_tasks(
    selection: Any,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of objects.")] = False,
) -> None:
    """List the tasks with what a reader of scores wants to know of them.

    [bold]Example[/]

        ume eval list --benchmark MMEB-v1
    """
    rows = []
    for task in selection.tasks:
        source = task.tables(selection.reading.labels)
        told = {name: getattr(task, name) for name in ("group", "modality", "ranking", "metric")}
        where = f"{source.repository} {source.config or ''}".strip()
        rows.append({"task": task.name, **told, "tables": where})
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    cells = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:  # never cut: names are there to be copied
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
