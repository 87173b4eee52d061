"""How row-major matrices reach kernels: as an address, an element type, sizes and a stride."""

from __future__ import annotations

import torch

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes of the native module, as ``ume::Element``."""

Matrix = tuple[int, int, int, int, int]
"""Address, element type, rows, columns, elements from row to row."""


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x [N, D]`` itself if the elements of a row are neighbours, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_stride(x: torch.Tensor) -> int:
    """Elements from row to row; a single row may have any stride, a usable one is returned."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def matrix(x: torch.Tensor) -> Matrix:
    """A matrix as the native module takes it."""
    return x.data_ptr(), ELEMENTS[x.dtype], x.shape[0], x.shape[1], row_stride(x)


def address(x: torch.Tensor | None) -> int:
    """Where a tensor starts, 0 for none."""
    return 0 if x is None else x.data_ptr()
