"""The ``ume`` command: names, options and help. What a command does is in ``commands``.

Nothing heavy is imported here, so that ``ume --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ume_models.cli import evaluation, items

app = typer.Typer(
    name="ume",
    help="Embed text, images, video and pages with a reasoning embedder, search and evaluate.",
    epilog="Begin with: ume demo.  Help of a command: ume embed --help.  "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but items were skipped, "
    "130 interrupted.  UME_DEBUG=1 shows the traceback of a failure.",
    no_args_is_help=True,
    add_completion=False,
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
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _command in (items.demo, items.embed, items.search, items.doctor):
    app.command()(_command)
app.command("eval")(evaluation.evaluate)
app.add_typer(evaluation.bench)


def main() -> None:
    """Entry point of the ``ume`` command."""
    _make_output_safe()
    app(prog_name="ume")


def _make_output_safe() -> None:
    """Let no output fail for its characters, or because stdout or stderr were closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - kept open
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
