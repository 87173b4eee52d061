"""The Triton tile of inner products that the contrastive loss and the top-k search share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def inner_products(
    a_ptr,
    b_ptr,
    a_first,
    b_first,
    a_stop,
    b_stop,
    a_stride,
    b_stride,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_k a[a_first + i, k] b[b_first + j, k]``, ``[BLOCK_M, BLOCK_N]`` in float32.

    Beyond ``a_stop`` and ``b_stop`` the last row is repeated, which keeps the loads free of masks;
    EVEN_K says that BLOCK_K divides D. Every element is summed in the same order.
    """
    # Offsets inside the tile fit in 32 bits, half the registers of addresses.
    a_ptr += tl.cast(a_first, tl.int64) * a_stride
    b_ptr += tl.cast(b_first, tl.int64) * b_stride
    a_row = tl.minimum(tl.arange(0, BLOCK_M), a_stop - a_first - 1)
    b_row = tl.minimum(tl.arange(0, BLOCK_N), b_stop - b_first - 1)
    column = tl.arange(0, BLOCK_K)[None, :]
    a_at = a_row[:, None] * a_stride + column
    b_at = b_row[:, None] * b_stride + column
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(a_ptr + k + a_at)
            b = tl.load(b_ptr + k + b_at)
        else:
            inside = k + column < D
            a = tl.load(a_ptr + k + a_at, mask=inside, other=0.0)
            b = tl.load(b_ptr + k + b_at, mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


def as_bytes(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as the bytes that kernels read; a vector without gaps."""
    return (mask.contiguous() if mask.ndim == 1 else mask).view(torch.uint8)
