"""Top-k in C++ on the CPU: csrc/cpu/similarity_topk.cpp and topk_segments.cpp.

Scores and selection run in one pass: a block of scores lives in the cache only. The sum of a score
takes one order, whatever the other queries, the other candidates and the number of threads are, so
equal candidates tie and both functions give the same pair the same score. bf16 against bf16 is
multiplied as such where the processor does that, everything else is widened to float32; sums are
float32.
"""

from __future__ import annotations

import torch

from ume_kernels import cpu_backend, native
from ume_kernels.matrices import address, matrix, rows_contiguous

_C = native.module

check = cpu_backend.check


def scan(
    q: torch.Tensor,
    c: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    *,
    q_inv: torch.Tensor | None = None,
    c_inv: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[torch.Tensor, bool]:
    """Merge the candidates ``c`` into the best keys so far.

    Score ``(i, j)`` is ``<q_i, c_j> * q_inv_i * c_inv_j``. Meant for k up to some hundreds; any k
    is right. Working memory is about 64 MiB at most, or ``32 k`` keys for each thread if that is
    more.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[n, D]``; the dtype may differ. Rows may be strided or unaligned.
        first: index of ``c[0]`` in the corpus.
        keys: int64 ``[Q, k]``, see ``keys``; not changed.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores, 1 if None.
        allowed: bool ``[n]`` or ``[Q, n]``: the candidates that count.
        threads: None is PyTorch's number.
        isa: name of the instruction set, for tests; None is the fastest one.

    Returns:
        The new keys in any order, and whether a score that counts is NaN; such pairs are left out.
    """
    assert _C is not None
    # Bound to names until the call is over: the addresses must stay valid.
    q, c, keys = (
        rows_contiguous(q),
        rows_contiguous(c),
        keys.clone(memory_format=torch.contiguous_format),
    )
    q_factors, c_factors = _floats(q_inv, q.shape[0]), _floats(c_inv, c.shape[0])
    stride = 0
    if allowed is not None:
        if allowed.shape not in {(c.shape[0],), (q.shape[0], c.shape[0])}:
            raise ValueError(f"allowed has shape {tuple(allowed.shape)}")
        allowed = allowed.bool()
        allowed = rows_contiguous(allowed) if allowed.ndim == 2 else allowed.contiguous()
        # An expanded row has stride 0 too: to the kernel that is a mask for all queries.
        stride = allowed.stride(0) if allowed.ndim == 2 else 0
    has_nan = _C.similarity_topk_scan(
        matrix(q),
        matrix(c),
        address(q_factors),
        address(c_factors),
        address(allowed),
        stride,
        first,
        keys.data_ptr(),
        keys.shape[1],
        threads or torch.get_num_threads(),
        isa,
    )
    return keys, has_nan


def scan_segments(
    q: torch.Tensor,
    c: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    first: int = 0,
    q_inv: torch.Tensor | None = None,
    c_inv: torch.Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[torch.Tensor, bool]:
    """The best of a list of candidates per query; scores as in ``scan``, bit for bit.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[n, D]``; the dtype may differ.
        offsets: int64 ``[Q + 1]``: query i has the candidates ``rows[offsets[i]:offsets[i + 1]]``.
        rows: int64 ``[E]``, rows of ``c`` in any order.
        k: keys per query.
        first: index of ``c[0]`` in the corpus.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores, 1 if None.
        threads, isa: as in ``scan``.

    Returns:
        Keys ``[Q, k]`` in any order, EMPTY where a list is shorter than k, and whether a score is
        NaN; such pairs are left out.

    Raises:
        IndexError: a row is not one of ``c``.
    """
    assert _C is not None
    q, c = rows_contiguous(q), rows_contiguous(c)
    q_factors, c_factors = _floats(q_inv, q.shape[0]), _floats(c_inv, c.shape[0])
    offsets, rows = offsets.long().contiguous(), rows.long().contiguous()
    if offsets.shape != (q.shape[0] + 1,) or rows.ndim != 1:
        raise ValueError("offsets must be [Q + 1] and rows [E]")
    steps = offsets.diff()
    if int(offsets[0]) < 0 or int(offsets[-1]) > rows.shape[0] or bool((steps < 0).any()):
        raise ValueError("offsets must rise from 0 to the length of rows")
    keys = torch.empty(q.shape[0], k, dtype=torch.int64)
    has_nan = _C.similarity_topk_segments(
        matrix(q),
        matrix(c),
        address(q_factors),
        address(c_factors),
        offsets.data_ptr(),
        rows.data_ptr(),
        first,
        keys.data_ptr(),
        k,
        threads or torch.get_num_threads(),
        isa,
    )
    return keys, has_nan


def _floats(x: torch.Tensor | None, count: int) -> torch.Tensor | None:
    if x is None:
        return None
    if x.shape != (count,):
        raise ValueError(f"expected {count} factors, got shape {tuple(x.shape)}")
    return x.float().contiguous()
