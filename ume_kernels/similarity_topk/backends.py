"""The backends of ``similarity_topk`` and when each runs.

Checks see ``(q, c, keys, rows)``: the queries, the candidates or an empty matrix like them, the
keys ``[Q, k]`` to be filled, and the rows of ``segments`` or None. The last two may be left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from ume_kernels import dispatch, native, triton_backend
from ume_kernels.cpu_backend import NO_VECTORS
from ume_kernels.dispatch import Backend, Obstacle

NAME = "similarity_topk"

_MODULES = {
    Backend.CUDA: "cuda",
    Backend.TRITON: "triton_kernels",
    Backend.NATIVE: "native",
    Backend.TORCH: "blocked",
}

MAX_FUSED = 128
"""Results per query that are selected inside the kernels of a GPU."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MANY = Obstacle(f"more than {MAX_FUSED} results per query")
_SEGMENTS = Obstacle("segments are scored by PyTorch on a GPU")
_SUBCLASS = Obstacle("q or c is a tensor subclass, whose own rules PyTorch follows")

Tensors = Sequence[torch.Tensor | None]


class Scans(Protocol):
    """What the module of a backend offers. Documented in ``blocked``."""

    def scan(
        self,
        q: torch.Tensor,
        c: torch.Tensor,
        first: int,
        keys: torch.Tensor,
        *,
        q_inv: torch.Tensor | None,
        c_inv: torch.Tensor | None,
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | bool]: ...

    def scan_segments(
        self,
        q: torch.Tensor,
        c: torch.Tensor,
        offsets: torch.Tensor,
        rows: torch.Tensor,
        k: int,
        *,
        first: int,
        q_inv: torch.Tensor | None,
        c_inv: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | bool]: ...


def _native_check(tensors: Tensors) -> Obstacle | None:
    from ume_kernels.similarity_topk import native as kernels

    obstacle = kernels.check(tensors[:2])
    if obstacle is not None:
        return obstacle
    if any(type(t) not in _PLAIN for t in tensors[:2]):
        return _SUBCLASS
    if native.cpu_isa() == "scalar":
        return NO_VECTORS
    return None


def _triton_check(tensors: Tensors) -> Obstacle | None:
    return _fused(tensors) or triton_backend.check(NAME, tensors[:2])


def _cuda_check(tensors: Tensors) -> Obstacle | None:
    if tensors and tensors[0] is not None and not tensors[0].is_cuda:
        return Obstacle(f"its tensors are on {tensors[0].device.type}")
    if not torch.cuda.is_available():
        return Obstacle("no CUDA device")
    obstacle = _fused(tensors)
    if obstacle is not None:
        return obstacle
    check: dispatch.Check = importlib.import_module("ume_kernels.similarity_topk.cuda").check
    return check(tensors[:2])


def _fused(tensors: Tensors) -> Obstacle | None:
    """What keeps a call from the kernels of a GPU, whatever the machine."""
    keys, rows = [*tensors[2:], None, None][:2]
    if rows is not None:
        return _SEGMENTS
    return _MANY if keys is not None and keys.shape[1] > MAX_FUSED else None


dispatch.register(
    NAME,
    {
        Backend.CUDA: _cuda_check,
        Backend.TRITON: _triton_check,
        Backend.NATIVE: _native_check,
        Backend.TORCH: dispatch.always,
    },
    operands=2,
)


def implementation(backend: Backend) -> Scans:
    """The module of a backend, imported when it is first needed."""
    module = importlib.import_module(f"ume_kernels.similarity_topk.{_MODULES[backend]}")
    return cast(Scans, module)
