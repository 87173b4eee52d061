"""Kernels that keep to a budget, break it, do not compile, and are not listed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale_kernel(Y_ptr, X_ptr, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y_ptr + at, x * factor, mask=at < n)


@triton.jit
def _product_kernel(
    Y_ptr,
    A_ptr,
    B_ptr,
    K,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        a = tl.load(A_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(B_ptr + n[None, :] * K + start + k[:, None])
        total += tl.dot(a, b)
    tl.store(Y_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def _broken_kernel(Y_ptr, X_ptr):
    tl.store(Y_ptr, tl.load(X_ptr + X_ptr))


@triton.jit
def _forgotten_kernel(Y_ptr):
    tl.store(Y_ptr, 0.0)
