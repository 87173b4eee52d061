"""When the C++ kernels of ``ume_kernels._C``, and what is composed around them, can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_kernels import native
from ume_kernels.dispatch import Obstacle
from ume_kernels.matrices import ELEMENTS

MISSING = Obstacle(
    native.missing or "",
    missing="ume_kernels._C" if native.module is None else None,
    remedy=native.remedy,
)
NO_VECTORS = Obstacle("the processor has neither AVX2 nor AVX-512", soft=True)


def composed_check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Why the backend ``composed`` cannot run, or None; the first tensor decides."""
    first = tensors[0] if tensors else None
    if first is None or first.is_cpu:
        return None
    return Obstacle(f"its tensors are on {first.device.type}")


def check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Why they cannot run for two matrices, the first two tensors, or None; without any, ever."""
    if native.module is None:
        return MISSING
    for tensor in tensors[:2]:
        assert tensor is not None
        if not tensor.is_cpu:
            return Obstacle(f"its tensors are on {tensor.device.type}")
        if tensor.dtype not in ELEMENTS:
            return Obstacle(f"no native kernel for {tensor.dtype}")
    return None
