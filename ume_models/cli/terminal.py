"""What every command says and how it ends: consoles, remarks, exit codes, failures in one line.

Results go to stdout, everything else to stderr; no control codes where there is no terminal, and
none from a corpus anywhere.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ume_models.errors import UmeError

_WIDTH_OF_FILES = 110
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPED = {
    code: f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *_BIDIRECTIONAL)
    if chr(code) not in "\t\n"
}

log = logging.getLogger("ume_models.cli")


class ExitCode(IntEnum):
    """Exit codes of ``ume`` (2, wrong usage, is the argument parser's)."""

    OK = 0
    FAILED = 1
    SKIPPED = 3
    INTERRUPTED = 130


def visible(text: str) -> str:
    """Text whose control sequences do nothing to a terminal; JSON stays the same JSON.

    Ids and texts of a corpus come from strangers, and so do names of files.
    """
    return text.translate(_ESCAPED)


class _Console(Console):
    """Escapes control sequences in whatever it prints, and leaves its own as they are."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)  # before its width is measured

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def results() -> Console:
    """Console for results. Not attached to a terminal, it writes plain text of a fixed width."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    return _Console(width=width, highlight=False, soft_wrap=False)


def messages() -> Console:
    """Console for progress and remarks."""
    return _Console(stderr=True, highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """A remark on stderr, unless with ``--quiet``."""
    log.info("%s", text)


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Let the loggers of both packages write to stderr: remarks, warnings only, or everything."""
    for name in ("ume_models", "ume_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [_Stderr()]
        logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


class _Stderr(logging.Handler):
    """Writes to what is stderr at that time, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        messages().print(self.format(record), markup=False)


@contextmanager
def failures_reported() -> Iterator[None]:
    """Turn expected failures into a message on stderr and an exit code.

    ``UmeError``, ``OSError``, ``BackendError`` and too little memory end the program with 1,
    Ctrl-C with 130. Anything else is a defect of this program and keeps its traceback, as
    everything does with ``UME_DEBUG=1``.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone (`ume search … | head`): not an error
        _leave_stdout()
        raise SystemExit(ExitCode.FAILED) from None
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted. {stop}".rstrip(), file=sys.stderr)
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except (UmeError, OSError, ValueError, MemoryError, RuntimeError) as error:
        told = isinstance(error, (UmeError, OSError)) or _is_backend_error(error)
        if not told and not _is_out_of_memory(error):
            raise
        if os.environ.get("UME_DEBUG", "0") not in ("", "0"):
            raise
        _leave_stdout()
        print(f"error: {visible(_message(error))}", file=sys.stderr)
        raise SystemExit(ExitCode.FAILED) from None


@contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Tell after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None


def _leave_stdout() -> None:
    """Python would complain at its end about what cannot be written, so it gets another stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_backend_error(error: Exception) -> bool:
    """Whether the user asked for a backend that does not run here, as with UME_BACKEND."""
    from ume_kernels.dispatch import BackendError

    return isinstance(error, BackendError)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short; torch has no class of its own for that on the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def _message(error: Exception) -> str:
    if not isinstance(error, UmeError) and _is_out_of_memory(error):
        # torch adds a listing of its allocator; the first line has what was asked for.
        said = str(error).partition("\n")[0]
        return (
            "out of memory"
            + f": {said}" * bool(said)
            + "; less is needed with lower --batch-tokens (and, for `ume embed`, --shard-size)"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
