"""``ume bench report``: files of results as tables and plots."""

from __future__ import annotations

from pathlib import Path

from ume_models.commands.bench.keeping import keep as keep_results
from ume_models.commands.bench.keeping import refuse_try
from ume_models.commands.bench.page import Part, render_page
from ume_models.commands.bench.plots import MISSING, Plot, available, draw
from ume_models.commands.bench.reading import read_results
from ume_models.commands.bench.tables import Table, markdown, origin, tables
from ume_models.commands.console import messages
from ume_models.commands.outcome import failures_reported
from ume_models.commands.output_file import write_output


def run(files: list[Path], output: Path | None = None, keep: Path | None = None) -> None:
    """Print tables in Markdown; with ``output`` write them, a page and plots into that folder.

    Args:
        files: results of pytest-benchmark, of a GPU session, or kept ones.
        output: folder for ``report.md``, ``report.html`` and the plots; without matplotlib there
            are no plots, which is said.
        keep: folder or file for what is worth keeping of the results.
    """
    with failures_reported():
        parts = [read_results(path) for path in files]
        for results in parts:
            refuse_try(results)
        several = len(parts) > 1
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            if not available():
                messages().print(MISSING, markup=False)
        pieces = []
        for number, results in enumerate(parts, start=1):
            plots: list[Plot] = []
            if output is not None and available():
                plots = draw(results, output, f"{number}-" if several else "")
            pieces.append(Part(results.name, origin(results), tables(results), plots))
        text = "\n".join(_markdown(piece, several) for piece in pieces)
        print(text, end="")
        if output is not None:
            write_output(output / "report.md", text)
            write_output(output / "report.html", render_page(pieces))
            messages().print(f"written: {output / 'report.html'}", markup=False)
        if keep is not None:
            for path in keep_results(parts, keep):
                messages().print(f"kept: {path}", markup=False)


def _markdown(part: Part, several: bool) -> str:
    """One file's tables, and its plots as pictures beside the text."""
    lines = [f"# {part.name}", ""] if several else []
    lines += [_section(table) for table in part.tables]
    lines += [f"![{plot.title}]({plot.name}.png)\n" for plot in part.plots]
    return "\n".join([*lines, part.origin, ""])


def _section(table: Table) -> str:
    return markdown(table) + "\n"
