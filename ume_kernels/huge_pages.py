"""Weights on huge pages: the same bytes, fewer page-table walks.

A product with few rows touches every weight once. With 4 KiB pages the processor then walks the
page table every 2048 bf16 weights, and those walks are not hidden behind the arithmetic. Linux maps
2 MiB at a time for memory that asks for it; PyTorch's allocator does not ask by default.
"""

from __future__ import annotations

import mmap

import torch

HUGE_PAGE = 2 << 20


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor, contiguous, in memory that asks Linux for huge pages.

    The tensor itself is returned when it is not on the CPU, is smaller than one such page, or the
    system has no such request. The memory is freed with the last view of the copy.
    """
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_cpu or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return tensor
    raw = torch.frombuffer(area, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    copy = raw[start : start + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor.detach())


def parameters_on_huge_pages(module: torch.nn.Module) -> int:
    """Move the CPU parameters of `module` in place, one by one; returns the bytes moved.

    Parameters stay the same objects (tied ones stay tied) with the same values.
    """
    moved = 0
    for parameter in module.parameters():
        copy = on_huge_pages(parameter.data)
        if copy.data_ptr() != parameter.data_ptr():
            parameter.data = copy
            moved += copy.numel() * copy.element_size()
    return moved
