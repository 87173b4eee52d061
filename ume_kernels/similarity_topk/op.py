"""``similarity_topk``: what callers, compiled graphs and ``torch.library`` see of the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ume_kernels.dispatch import Backend
from ume_kernels.scalars import plain
from ume_kernels.similarity_topk.search import Result, search
from ume_kernels.similarity_topk.stream import RowSlices


def similarity_topk(
    q: torch.Tensor,
    c: torch.Tensor | RowSlices,
    k: int,
    *,
    normalize: bool = False,
    segments: Sequence[Any] | None = None,
    allowed: torch.Tensor | None = None,
    block: int | None = None,
    sorted: bool = True,
    backend: Backend | str | None = None,
) -> Result:
    """The ``k`` candidates with the largest inner product ``<q_i, c_j>`` for each query.

    Products of the inputs as they are, sums and scores in float32. Equal scores keep the order of
    their indices, whatever the blocks are. An overflow to ±inf ranks as such. The ``Q x N`` scores
    are never stored. Not differentiable. PyTorch's own products on CUDA (k above 128) follow its
    float32 matmul precision, full float32 unless the program enabled TF32.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[N, D]``, whose dtype may differ: a tensor on the same device, or, streamed
            block by block with the next one on its way, a CPU tensor for queries on a CUDA device,
            a numpy array (also memory-mapped), or anything with shape, dtype and slices of rows.
        k: results per query, ``1 <= k <= N``. On a GPU at most 128 are selected inside the product
            and more are merged block by block; on a CPU any number is selected inside.
        normalize: divide by ``max(|q_i|, 1e-12) max(|c_j|, 1e-12)``: cosine. No copy is made.
        segments: what each query ranks instead of all of ``c``: a list of Q lists of rows of
            ``c``, or a tuple of rows ``[E]`` of all queries and the offset ``[Q + 1]`` of each,
            int64. Lists may overlap, be shorter than ``k`` or empty; a row listed twice is
            returned twice.
        allowed: bool ``[N]`` or ``[Q, N]``: only these may be returned.
        block: candidates scored, and where they are streamed read and copied, at a time (rounded
            up to a multiple of 256). Chosen by size if None.
        sorted: best first; else in any order.
        backend: insist on one of ``ume_kernels.Backend``; ``UME_BACKEND`` does so too.

    Returns:
        ``(scores [Q, k] float32, indices [Q, k] int64)`` on the device of ``q``. Where fewer than
        ``k`` candidates are listed and allowed, the rest is −inf and −1.

    Raises:
        ValueError: a shape, dtype or device does not fit, ``k`` is out of range, or a score is
            NaN: an input holds NaN or infinity, or a norm overflows float32.
        TypeError: ``c`` is none of these.
        BackendError: the backend asked for cannot run.
    """
    k, block = plain(k), plain(block)
    tensors = (q, c) if allowed is None else (q, c, allowed)
    if not torch.compiler.is_compiling():
        return search(q, c, k, normalize, segments, allowed, block, sorted, backend)
    if segments is None and all(map(torch.is_tensor, tensors)):
        assert isinstance(c, torch.Tensor)
        wanted = None if backend is None else str(backend)
        return _op(q.detach(), c.detach(), k, normalize, allowed, block, sorted, wanted)
    from ume_kernels.similarity_topk.outside_graphs import search as outside

    return outside(q, c, k, normalize, segments, allowed, block, sorted, backend)


@torch.library.custom_op("ume::similarity_topk", mutates_args=())
def _op(
    q: torch.Tensor,
    c: torch.Tensor,
    k: int,
    normalize: bool,
    allowed: torch.Tensor | None,
    block: int | None,
    sorted: bool,
    backend: str | None,
) -> Result:
    return search(q, c, k, normalize, None, allowed, block, sorted, backend)


@_op.register_fake
def _(q: torch.Tensor, c: torch.Tensor, k: int, *others: object) -> Result:
    size = (q.shape[0], k)
    return q.new_empty(size, dtype=torch.float32), q.new_empty(size, dtype=torch.int64)
