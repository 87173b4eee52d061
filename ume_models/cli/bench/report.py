"""``ume bench report``: files of results as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ume_models.cli.options import Command, Group, path_option
from ume_models.cli.output_file import write_output
from ume_models.cli.terminal import tell, visible

if TYPE_CHECKING:
    from ume_models.cli.bench.page import Part

app = typer.Typer(name="bench", cls=Group, help="Results of the benchmarks.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass


@app.command(cls=Command)
def report(
    files: Annotated[list[Path], typer.Argument(
        metavar="RESULTS.json",
        help="What `pytest benchmarks --benchmark-only --benchmark-json=FILE` wrote, a GPU "
        "session, or a kept file.",
    )],
    output: Annotated[Path | None, path_option(
        "--output", "-o", metavar="DIR", help="Write tables, a page and plots there, too."
    )] = None,
    keep: Annotated[Path | None, path_option(
        "--keep",
        metavar="PATH",
        help="Write what is worth keeping, without the names of machine and user: a folder (then "
        "the name has machine and date) or a .json file.",
    )] = None,
) -> None:
    """Tables and plots of benchmark results. Without matplotlib there are no plots.

    [bold]Examples[/]

        pytest benchmarks --benchmark-only --benchmark-json=out.json

        ume bench report out.json -o report
    """
    from ume_models.cli.bench.keeping import keep as keep_results
    from ume_models.cli.bench.keeping import refuse_try
    from ume_models.cli.bench.page import Part, render_page
    from ume_models.cli.bench.plots import MISSING, available, draw
    from ume_models.cli.bench.reading import read_results
    from ume_models.cli.bench.tables import origin, tables

    parts = [read_results(path) for path in files]
    for results in parts:
        refuse_try(results)
    drawn = output is not None and available()
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        if not drawn:
            tell(MISSING)
    several = len(parts) > 1
    pieces = []
    for number, results in enumerate(parts, start=1):
        plots = draw(results, output, f"{number}-" * several) if output and drawn else []
        pieces.append(Part(results.name, origin(results), tables(results), plots))
    text = "\n".join(_markdown(piece, several) for piece in pieces)
    print(visible(text), end="")
    if output is not None:
        write_output(output / "report.md", text)
        write_output(output / "report.html", render_page(pieces))
        tell(f"written: {output / 'report.html'}")
    if keep is not None:
        for path in keep_results(parts, keep):
            tell(f"kept: {path}")


def _markdown(part: Part, several: bool) -> str:
    """One file's tables, and its plots as pictures beside the text."""
    from ume_models.cli.bench.tables import markdown

    lines = [f"# {part.name}", ""] if several else []
    lines += [markdown(table) + "\n" for table in part.tables]
    lines += [f"![{plot.title}]({plot.name}.png)\n" for plot in part.plots]
    return "\n".join([*lines, part.origin, ""])
