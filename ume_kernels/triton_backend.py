"""When Triton kernels can run, and what happens when one does not compile.

Nothing here imports Triton or touches the driver at import: a machine without either still
imports the package. ``TRITON_INTERPRET=1`` runs the kernels on CPU tensors; it must be set before
Triton is imported, and it knows float32 and float16 only (bfloat16 is silently wrong there).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch

from ume_kernels.dispatch import Backend, BackendError, Obstacle, requested

Result = TypeVar("Result")

MIN_CAPABILITY = (8, 0)
"""Ampere: bf16 tensor cores and asynchronous copies."""

_INTERPRETED = (torch.float32, torch.float16)
_COMPILED = (torch.float32, torch.float16, torch.bfloat16)

_INTERPRETER = Obstacle("the interpreter is for tests; it runs when asked for by name", soft=True)

_broken: dict[str, str] = {}
"""Operations whose kernels failed to compile in this process, and why."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def check(op: str, tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Why the Triton kernels of ``op`` cannot run, or None; the first tensor decides.

    Asked without tensors it answers for the machine and does not touch the driver beyond
    ``torch.cuda.is_available``.
    """
    useful = bool(tensors) or interpreting() or torch.cuda.is_available()
    if not _installed() and useful:
        return Obstacle(
            "Triton is not installed", missing="triton", remedy='pip install "triton>=3.6"'
        )
    if op in _broken:
        return Obstacle(f"its kernels did not compile: {_broken[op]}", soft=True)
    if not useful:
        return Obstacle("no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    if not tensors:
        return _INTERPRETER if interpreting() else None
    first = tensors[0]
    assert first is not None
    if any(t is not None and t.device != first.device for t in tensors):
        return Obstacle("its tensors are on different devices")
    if interpreting():
        if not first.is_cpu:
            return Obstacle("TRITON_INTERPRET=1 runs kernels on CPU tensors only")
        if first.dtype not in _INTERPRETED:
            return Obstacle(f"the interpreter computes {first.dtype} wrongly; use float32")
        return _INTERPRETER
    if not first.is_cuda:
        return Obstacle(
            f"its tensors are on {first.device.type} (TRITON_INTERPRET=1 runs the kernels there)"
        )
    if first.dtype not in _COMPILED:
        return Obstacle(f"no kernel for {first.dtype}")
    capability = _capability(first.device.index)
    if capability < MIN_CAPABILITY:
        return Obstacle(
            f"compute capability {capability[0]}.{capability[1]} is below "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    return None


def attempt(
    op: str,
    kernels: Callable[[], Result],
    otherwise: Callable[[], Result],
    backend: Backend | str | None = None,
    device: torch.device | None = None,
) -> Result:
    """Run ``kernels`` on ``device``; if they do not compile, warn once and run ``otherwise``.

    From then on ``check`` has them in the way, so that later calls go elsewhere at once. Triton
    launches on the current device, which need not be that of the tensors: name theirs.

    Raises:
        BackendError: they do not compile and the caller or ``UME_BACKEND`` insists on them.
    """
    if op in _broken and backend is None and requested(op) is None:
        return otherwise()
    guard = torch.cuda.device(device) if device and device.type == "cuda" else nullcontext()
    try:
        with guard:
            return kernels()
    except Exception as error:
        if not _is_compile_failure(error):
            raise
        lines = str(error).strip().splitlines() or ["no message"]
        reason = f"{type(error).__name__}: {lines[-1][:200]}"
        if backend is not None or requested(op) is not None:
            raise BackendError(f"the Triton kernels of {op!r} do not compile: {reason}") from error
        _broken[op] = reason
        warnings.warn(
            f"the Triton kernels of {op!r} do not compile here, PyTorch runs instead "
            f"(slower, same results): {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
        return otherwise()


def _is_compile_failure(error: Exception) -> bool:
    # Launch and memory errors are not among them: the device's state is unknown after those.
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    if isinstance(error, (CompilationError, TritonError, subprocess.CalledProcessError)):
        return True
    # The compiler's passes and the build of a launcher raise plain RuntimeErrors.
    marks = ("C compiler", "PassManager::run failed", "failed to translate module to LLVM IR")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
