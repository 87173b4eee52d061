"""``ume eval check``: whether anything in the data would stop an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ume_models.cli.eval.selection import (
    DataOption,
    DecodersOption,
    OutputOption,
    data_root,
    selection_options,
)
from ume_models.cli.options import takes
from ume_models.cli.terminal import ExitCode, visible


@takes(selection=selection_options)
def check(
    selection: Any,
    data: DataOption = None,
    output: OutputOption = None,
    workers: DecodersOption = None,
) -> None:
    """Verify the data root: tables, labels, every picture. Needs no model.

    The miniature is made in DIR, without -o in a folder that is removed again.
    Ends with 1 if something would stop an evaluation.

    [bold]Example[/]

        ume eval check --data MMEB-V2
    """
    import tempfile

    from ume_models.cli.eval.progress import EvalProgress
    from ume_models.mmeb.check import check as find_problems
    from ume_models.mmeb.locate import misplaced

    tasks, reading = selection
    with tempfile.TemporaryDirectory(prefix="ume-eval-") as passing:
        root = data_root(data, output or Path(passing))
        with EvalProgress() as progress:
            threads = max(1, 2 if workers is None else workers)
            problems = find_problems(
                tasks, root, reading, workers=threads, progress=progress.checking
            )
        wrong_root = misplaced(root, tasks) if problems else ""
    if wrong_root:
        print(visible(f"error: {wrong_root}"))
    for problem in problems:
        print(visible(str(problem)))
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        print(f"errors: {errors}, warnings: {len(problems) - errors}, tasks: {len(tasks)}")
        raise typer.Exit(ExitCode.FAILED)
    print(f"nothing stands in the way (tasks: {len(tasks)}, warnings: {len(problems)})")
