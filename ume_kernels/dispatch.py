"""Which implementation of an operation runs, and why.

Every operation registers the backends it has, best first, each with a check that answers for given
tensors. ``select`` takes the first that can and should run. A caller or the environment variable
``UME_BACKEND`` can insist on one: it then runs or raises, it is never replaced silently.

``UME_BACKEND`` is either one backend for every operation that has it (``torch``) or a list for
single ones (``linear:torch,decode:torch``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import overload

import torch

__all__ = [
    "Backend",
    "BackendError",
    "Check",
    "Obstacle",
    "OpReport",
    "explain",
    "operations",
    "register",
    "select",
]

ENVIRONMENT = "UME_BACKEND"


class Backend(str, Enum):
    """Ways to run an operation."""

    TORCH = "torch"
    """Plain PyTorch and nothing of ours: the reference, and what runs everywhere."""
    COMPOSED = "composed"
    """PyTorch on the CPU around other operations (``linear``), each with its own choice."""
    NATIVE = "native"
    """C++ for the CPU, in ``ume_kernels._C``."""
    TRITON = "triton"
    CUDA = "cuda"
    """CUDA C++ in ``ume_kernels._C``."""

    def __str__(self) -> str:
        return self.value


class BackendError(ValueError):
    """A backend was asked for by name and does not exist or cannot run here."""


@dataclass(frozen=True)
class Obstacle:
    """Why a backend does not run: ``reason`` in words, ``soft`` if it could but should not.

    ``missing`` and ``remedy`` name what to install, when that is what stands in the way.
    """

    reason: str
    soft: bool = False
    missing: str | None = None
    remedy: str | None = None


Check = Callable[[Sequence[torch.Tensor | None]], "Obstacle | None"]
"""Called with an operation's tensors, or with none to ask about the machine alone."""


@dataclass(frozen=True)
class OpReport:
    """The backend an operation would use on this machine and, if it is not the best, why."""

    op: str
    backend: Backend
    reason: str
    missing: str | None = None
    remedy: str | None = None


def needs_grad(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd follows a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def always(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """The check of a backend that runs everywhere."""
    return None


# An operation registers itself from its package.
_OPERATIONS: dict[str, dict[Backend, Check]] = {}
_OPERANDS: dict[str, int] = {}


def register(op: str, backends: Mapping[Backend, Check], operands: int = 0) -> None:
    """Declare the backends of `op`, best first. The last must be one that runs everywhere.

    `operands` is the least number of tensors that the checks take, when they get any.
    """
    if not backends:
        raise ValueError(f"operation {op!r} needs at least one backend")
    _OPERATIONS[op] = dict(backends)
    _OPERANDS[op] = operands


def operations() -> Mapping[str, Sequence[Backend]]:
    """Every registered operation with its backends, best first."""
    return {op: tuple(backends) for op, backends in _OPERATIONS.items()}


def _names(backends: Sequence[Backend] | type[Backend]) -> str:
    return ", ".join(b.value for b in backends)


def _backend(name: str, where: str) -> Backend:
    try:
        return Backend(name.strip().lower())
    except ValueError:
        raise BackendError(
            f"{where}: unknown backend {name!r}; valid ones are {_names(Backend)}"
        ) from None


@lru_cache(maxsize=8)
def _parse(value: str) -> tuple[Backend | None, Mapping[str, Backend]]:
    """UME_BACKEND as (backend for every operation, backend for single ones)."""
    where = f"{ENVIRONMENT}={value!r}"
    if not value.strip():
        return None, {}
    if ":" not in value:
        return _backend(value, where), {}
    single: dict[str, Backend] = {}
    for entry in filter(str.strip, value.split(",")):
        op, colon, name = entry.partition(":")
        if not colon or not name.strip():
            raise BackendError(
                f"{where}: {entry.strip()!r} is not OPERATION:BACKEND; give one backend for all "
                f"operations ({ENVIRONMENT}=torch) or a list for single ones "
                f"({ENVIRONMENT}=linear:torch,decode:torch)"
            )
        single[op.strip()] = _backend(name, where)
        if op.strip() not in _OPERATIONS:
            raise BackendError(
                f"{where}: unknown operation {op.strip()!r}; valid ones are "
                f"{', '.join(_OPERATIONS)}"
            )
    return None, single


def requested(op: str) -> Backend | None:
    """The backend that the environment insists on for `op`, None when it leaves the choice.

    A backend for every operation is one for every operation that has it.
    """
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return None
    everywhere, single = _parse(value)
    if op in single:
        return single[op]
    if everywhere is None or everywhere in _OPERATIONS.get(op, {}):
        return everywhere
    if not any(everywhere in backends for backends in _OPERATIONS.values()):
        raise BackendError(f"{ENVIRONMENT}={value!r}: no operation has that backend")
    return None


def _backends(op: str) -> dict[Backend, Check]:
    try:
        return _OPERATIONS[op]
    except KeyError:
        raise BackendError(
            f"unknown operation {op!r}; valid ones are {', '.join(_OPERATIONS)}"
        ) from None


def _insist(op: str, backend: Backend, tensors: Sequence[torch.Tensor | None]) -> Backend:
    backends = _backends(op)
    if backend not in backends:
        raise BackendError(
            f"operation {op!r} has no backend {backend.value!r}; it has {_names(list(backends))}. "
            f"To choose for single operations: {ENVIRONMENT}={op}:{next(iter(backends)).value}"
        )
    obstacle = backends[backend](tensors)
    if obstacle is not None and not obstacle.soft:
        remedy = f"; {obstacle.remedy}" if obstacle.remedy else ""
        raise BackendError(
            f"backend {backend.value!r} of operation {op!r} cannot run: {obstacle.reason}{remedy}"
        )
    return backend


def select(op: str, *tensors: torch.Tensor | None, backend: Backend | str | None = None) -> Backend:
    """The backend that `op` uses for `tensors`.

    `backend`, else ``UME_BACKEND``, is binding. BackendError: unknown operation or backend, or the
    one insisted on cannot run for these tensors.
    """
    if backend is not None:
        return _insist(op, _backend(str(backend), "backend"), tensors)
    wanted = requested(op)
    if wanted is not None:
        return _insist(op, wanted, tensors)
    for candidate, check in _backends(op).items():
        if check(tensors) is None:
            return candidate
    raise BackendError(f"no backend of operation {op!r} can run for these tensors")


@overload
def explain() -> list[OpReport]: ...


@overload
def explain(
    op: str, *tensors: torch.Tensor | None, backend: Backend | str | None = None
) -> OpReport: ...


def explain(
    op: str | None = None,
    *tensors: torch.Tensor | None,
    backend: Backend | str | None = None,
) -> list[OpReport] | OpReport:
    """What would run and why, and why no better backend does. Runs nothing, touches no GPU memory.

    Without arguments one report per operation, for this machine. With `op` the report of that
    operation; with `tensors` too (all that the operation has, in its order, None for those left
    out) for a call with them and `backend`.

    BackendError as ``select`` raises it for such a call (unknown names, or `backend` or
    ``UME_BACKEND`` asks for what cannot run), or for too few tensors.
    """
    if op is None:
        return [_report(name, (), None) for name in _OPERATIONS]
    least = _OPERANDS.get(op, 0)
    if tensors and len(tensors) < least:
        raise BackendError(f"{op!r} has at least {least} operands, not {len(tensors)}")
    return _report(op, tensors, backend)


def _report(
    op: str, tensors: Sequence[torch.Tensor | None], backend: Backend | str | None
) -> OpReport:
    chosen = select(op, *tensors, backend=backend)
    if backend is not None:
        return OpReport(op, chosen, "the caller asks for it")
    if requested(op) is not None:
        return OpReport(op, chosen, f"{ENVIRONMENT} asks for it")
    backends = _backends(op)
    passed: list[tuple[Backend, Obstacle]] = []
    for candidate, check in backends.items():
        obstacle = None if candidate is chosen else check(tensors)
        if obstacle is None:
            break
        passed.append((candidate, obstacle))
    if not passed:
        reason = "the only backend" if len(backends) == 1 else "the fastest backend"
        return OpReport(op, chosen, reason)
    reason = "; ".join(f"no {b.value}: {o.reason}" for b, o in passed)
    return OpReport(op, chosen, reason, passed[0][1].missing, passed[0][1].remedy)
