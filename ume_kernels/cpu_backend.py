"""When the C++ kernels of ``ume_kernels._C`` can run on CPU matrices."""

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
