"""When the CUDA C++ kernels of ``ume_kernels._C`` can run, and what their launchers share.

Nothing here touches the driver at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from ume_kernels import native
from ume_kernels.dispatch import Obstacle
from ume_kernels.matrices import row_stride

MIN_CAPABILITY = (8, 0)
"""Ampere: bf16 tensor cores and asynchronous copies."""

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels take."""

MAX_ROWS = (1 << 31) - 1024
"""Rows of a matrix: positions within a launch are 32-bit."""

_ALIGNED = 8
"""Elements of 16 bytes, which is what the kernels copy at a time."""


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Why the kernels cannot run for matrices ``[rows, D]``, or None; without any, the machine."""
    if native.module is None:
        return Obstacle(native.missing or "", missing="ume_kernels._C", remedy=native.remedy)
    if not native.module.with_cuda:
        return Obstacle(
            "the native module was built without CUDA",
            missing="nvcc",
            remedy=f"with nvcc on PATH, {native.remedy}" if native.remedy else None,
        )
    given = [t for t in tensors if t is not None]
    if not given:
        return None if torch.cuda.is_available() else Obstacle("no CUDA device")
    first = given[0]
    if not first.is_cuda:
        return Obstacle(f"its tensors are on {first.device.type}")
    if any(t.device != first.device for t in given):
        return Obstacle("its tensors are on different devices")
    if any(t.dtype != first.dtype for t in given):
        return Obstacle("its matrices differ in dtype")
    if first.dtype not in DTYPES:
        return Obstacle(f"no CUDA C++ kernel for {first.dtype}, only for bfloat16 and float16")
    capability = _capability(first.device.index)
    if capability < MIN_CAPABILITY:
        return Obstacle(
            f"compute capability {capability[0]}.{capability[1]} is below "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    return next((found for found in map(layout, given) if found is not None), None)


def layout(x: torch.Tensor) -> Obstacle | None:
    """What about the shape, strides or start of a matrix the kernels cannot take, or None."""
    if x.shape[0] > MAX_ROWS:
        return Obstacle(f"{x.shape[0]} rows are more than {MAX_ROWS}")
    if x.shape[1] % _ALIGNED or x.shape[1] == 0:
        return Obstacle(f"{x.shape[1]} columns are not a multiple of {_ALIGNED}")
    if x.shape[0] and (x.stride(1) != 1 or row_stride(x) % _ALIGNED or x.data_ptr() % 16):
        return Obstacle("the rows of a matrix do not start at multiples of 16 bytes")
    return None


def stream(device: torch.device) -> int:
    """PyTorch's current stream of a device, as a ``cudaStream_t``."""
    return int(torch.cuda.current_stream(device).cuda_stream)
