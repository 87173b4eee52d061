"""Results go to stdout, everything else to stderr; no control codes where there is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDTH_OF_FILES = 110


def results() -> Console:
    """Console for results. Not attached to a terminal, it writes plain text of a fixed width."""
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_OF_FILES, highlight=False, soft_wrap=False
    )


def messages() -> Console:
    """Console for progress and remarks."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
