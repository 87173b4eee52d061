"""``python -m ume_kernels.aot``: compile every kernel, hold it against its budget, print a table.

Exit status 1 if a variant is outside its budget, does not compile or is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ume_kernels.aot.build import Report, compile_all
from ume_kernels.aot.occupancy import ARCHITECTURES
from ume_kernels.aot.variant import ROOMS
from ume_kernels.version import __version__


def as_json(report: Report, archs: Sequence[int]) -> dict[str, Any]:
    """The report with versions and date."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ume_kernels": __version__,
        "triton": report.triton,
        "architectures": [f"sm_{arch}" for arch in archs],
        "passed": report.passed,
        "uncovered": list(report.uncovered),
        "variants": [asdict(row) for row in report.compiled],
    }


def table(report: Report) -> Table:
    """One line per variant and architecture."""
    out = Table(
        title=f"Triton {report.triton}, compiled without a GPU",
        caption="registers, shared: used / most allowed; blocks: on a multiprocessor / least "
        "required; copies: asynchronous ones",
    )
    out.add_column("variant", overflow="fold")
    out.add_column("sm")
    for name in ("registers", "spilled", "shared", "blocks", "warps"):
        out.add_column(name, justify="right")
    out.add_column("limited by")
    for name in ("copies", "mma"):
        out.add_column(name, justify="right")
    out.add_column("verdict", overflow="fold")
    for row in report.compiled:
        fits = row.occupancy
        numbers = ["–"] * 8
        if fits is not None:
            numbers = [
                f"{row.registers}/{row.budget.registers}",
                str(row.local),
                f"{row.shared}/{row.budget.shared}",
                f"{fits.blocks}/{row.budget.blocks_per_sm}",
                str(fits.warps),
                fits.limit,
                str(row.instructions["async_copy"]),
                str(row.instructions["mma"]),
            ]
        verdict = "[red]" + "; ".join(row.failures) if row.failures else "[green]ok"
        out.add_row(f"{row.room}: {row.name}", str(row.arch), *numbers, verdict)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, compile, print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ume_kernels.aot", description="Compile every Triton kernel without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[80, 90])
    parser.add_argument(
        "--room",
        nargs="+",
        default=list(ROOMS),
        metavar="ROOM",
        help=f"{', '.join(ROOMS)} (default: all), or the dotted name of a module with variants()",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    for room in options.room:
        if "." not in room and room not in ROOMS:
            parser.error(f"unknown room {room!r}; there are {', '.join(ROOMS)}")
    if importlib.util.find_spec("triton") is None:
        parser.error('Triton is not installed: pip install "triton>=3.6"')
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    report = compile_all(options.room, options.arch, options.jobs)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table(report))
    for what in report.uncovered:
        console.print(f"[red]not compiled:[/] {what}", highlight=False)
    failed = sum(bool(row.failures) for row in report.compiled)
    console.print(f"{len(report.compiled)} compiled, {failed} outside their budget")
    if options.json:
        options.json.write_text(json.dumps(as_json(report, options.arch), indent=2) + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
