"""``ume eval compare``: how two evaluations differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ume_models.cli.eval.selection import OutputOption
from ume_models.cli.output_file import write_output
from ume_models.cli.terminal import results


def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of an evaluation.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.")],
    output: OutputOption = None,
) -> None:
    """Compare the results of two evaluations; -o writes them too.

    [bold]Example[/]

        ume eval compare runs/plume runs/other -o comparison
    """
    from ume_models.mmeb.compare import compare as compare_runs
    from ume_models.mmeb.embeddings import task_embeddings
    from ume_models.mmeb.report import comparison as report
    from ume_models.mmeb.results import RunFolder

    found = compare_runs(RunFolder(one), RunFolder(other), task_embeddings)
    if output is not None:
        text = json.dumps(found.to_json(), ensure_ascii=False, indent=1) + "\n"
        write_output(output / "comparison.json", text)
        write_output(output / "comparison.md", report.comparison_markdown(found))
        write_output(output / "comparison.html", report.comparison_page(found))
    results().print(report.comparison_table(found))
