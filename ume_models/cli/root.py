"""The ``ume`` command: its options and the commands below it.

Nothing heavy is imported by any of their files before a command runs, so that ``ume --help``
answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from ume_models.cli import eval
from ume_models.cli.bench.report import app as bench
from ume_models.cli.demo import demo
from ume_models.cli.doctor import doctor
from ume_models.cli.embed import embed
from ume_models.cli.options import Command, Group
from ume_models.cli.search import search
from ume_models.cli.terminal import failures_reported, set_verbosity


class _Root(Group):
    def invoke(self, ctx: Any) -> Any:
        with failures_reported():
            return super().invoke(ctx)


app = typer.Typer(
    name="ume",
    cls=_Root,
    help="Embed text, images, video and pages with universal multimodal embedders (PLUME, UME-R1, "
    "VLM2Vec, GME, LamRA), search and evaluate.",
    epilog="Begin with: ume demo.  Help of a command: ume embed --help.  "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but items were skipped, "
    "130 interrupted.  UME_DEBUG=1 shows the traceback of a failure.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import ume_models

        print(f"ume {ume_models.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what was loaded and which kernels run.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Tell results, warnings and errors only.")
    ] = False,
) -> None:  # fmt: skip
    set_verbosity(verbose, quiet)


for _command in (demo, embed, search, doctor):
    app.command(cls=Command)(_command)
app.add_typer(eval.app)
app.add_typer(bench)


def main() -> None:
    """Entry point of the ``ume`` command."""
    for name in ("stdout", "stderr"):  # no output fails for its characters or a closed stream
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - kept open
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with failures_reported():  # of help and usage
        app(prog_name="ume")
