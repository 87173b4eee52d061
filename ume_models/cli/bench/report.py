"""``ume bench report``: files of results as tables, plots and a page, and what is kept of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ume_models.cli.options import Command, Group, path_option
from ume_models.cli.output_file import write_output
from ume_models.cli.terminal import tell, visible
from ume_models.errors import DataError

if TYPE_CHECKING:
    from ume_models.cli.bench.figures import Results
    from ume_models.cli.bench.plots import Plot
    from ume_models.cli.bench.tables import Table


class Part(NamedTuple):
    """What one file of results gives: its name, origin, tables and plots."""

    name: str
    origin: str
    tables: Sequence[Table]
    plots: Sequence[Plot]


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


def render_page(parts: Sequence[Part]) -> str:
    """Tables and plots as one HTML page that needs no other file; texts are escaped."""
    import base64

    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ume_models.cli.bench"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Each plot is a picture of its own, so that ids inside of two do not meet.
    environment.filters["data_uri"] = lambda svg: (
        "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    )
    return environment.get_template("page.html").render(parts=parts)


def kept_name(results: Results) -> str:
    """``DATE-MACHINE.json``: the GPU, or the CPU and its cores."""
    gpu = results.machine.get("gpu")
    name = gpu["name"] if gpu else str(results.machine.get("cpu", "unknown"))
    if not gpu and "cores" in results.machine:
        name += f" {results.machine['cores']} cores"
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"{results.date[:10]}-{slug}.json"


def keep_results(parts: Sequence[Results], target: Path) -> list[Path]:
    """Write what is worth keeping into a folder or, of one file, into a file; returns the paths.

    Raises:
        DataError: the results are of a try, two would get one name, or several are given for one
            file. Nothing is written then.
        OSError: a file cannot be written; it is named.
    """
    for results in parts:
        refuse_try(results)
    if target.suffix == ".json" and not target.is_dir():
        if len(parts) > 1:
            raise DataError(f"{target}: is one file for {len(parts)} results; name a folder")
        paths = [target]
    else:
        paths = [target / kept_name(results) for results in parts]
    if len(set(paths)) < len(paths):
        raise DataError(
            f"{target}: two of the results are of one machine and day and would get one name; "
            "keep them one by one, each with the name of a file"
        )
    for path, results in zip(paths, parts, strict=True):
        write_output(path, json.dumps(results.kept, indent=2) + "\n")
    return paths


def refuse_try(results: Results) -> None:
    """Raise DataError for the results of a try or dry run: nothing was measured."""
    if results.tried:
        raise DataError(
            f"{results.name}: these results are of a dry run: nothing was measured. Run it with "
            "real sizes"
        )
