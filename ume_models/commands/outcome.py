"""How a command ends: exit codes, and failures told without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from ume_models.errors import UmeError


class ExitCode(IntEnum):
    """Exit codes of ``ume`` (2, wrong usage, is the argument parser's)."""

    OK = 0
    FAILED = 1
    SKIPPED = 3
    INTERRUPTED = 130


@contextmanager
def failures_reported(when_interrupted: str = "") -> Iterator[None]:
    """Turn expected failures into a message on stderr and an exit code.

    ``UmeError``, ``OSError``, ``BackendError`` and too little memory end the command with 1,
    Ctrl-C with 130.
    Anything else is a defect of this program and keeps its traceback, as everything does with
    ``UME_DEBUG=1``.

    Args:
        when_interrupted: what to tell after Ctrl-C, such as how to go on.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of stdout has gone (`ume search … | head`): not an error, and nothing more
        # can be written. Python would complain while closing stdout, so it gets another one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.FAILED) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted. {when_interrupted}".rstrip(), file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (UmeError, OSError, ValueError, MemoryError, RuntimeError) as error:
        told = isinstance(error, (UmeError, OSError)) or _is_backend_error(error)
        if not told and not _is_out_of_memory(error):
            raise
        if os.environ.get("UME_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from None


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
