"""Chunked top-k by inner product: never holds the ``Q x N`` score matrix.

Scores and positions are packed into one int64 key per pair, score above, position below, so that
every key of a row is different and a plain ``topk`` returns the same answer whatever the chunks
and whatever its own order among equals.
"""

from __future__ import annotations

import torch

from ume_kernels.dispatch import select
from ume_kernels.similarity_topk.reference import whole_tiles

_QUERY_BLOCK = 256
_LOW_WORD = 0xFFFFFFFF
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def similarity_topk(
    q: torch.Tensor, c: torch.Tensor, k: int, *, chunk: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` candidates with the largest inner product ``<q_i, c_j>``, best first.

    Inputs are widened to float32 before the product. Equal scores keep the order of their
    indices, whatever ``chunk`` is. Not differentiable. On CUDA the product follows PyTorch's
    float32 matmul precision, which is full float32 unless the program enabled TF32.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[N, D]`` on the same device; the dtype may differ.
        k: results per query, ``1 <= k <= N``.
        chunk: candidates scored at a time (rounded up to a multiple of 256). Working memory is
            about ``chunk * (4 D + 12 * min(Q, 256))`` bytes beside the ``[Q, k]`` results.

    Returns:
        ``(scores [Q, k] float32, indices [Q, k] int64)``.

    Raises:
        ValueError: a shape, dtype or device does not fit, ``k`` is out of range, or a score is
            NaN (an input contains NaN or infinity).
    """
    _check(q, c, k, chunk)
    select("similarity_topk", q, c)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        queries = q.float().contiguous()
        step = min(whole_tiles(chunk), whole_tiles(c.shape[0]))
        block = torch.zeros(step, c.shape[1], device=c.device)
        keys = torch.empty(q.shape[0], 0, dtype=torch.int64, device=q.device)
        invalid = torch.zeros((), dtype=torch.bool, device=q.device)
        for start in range(0, c.shape[0], step):
            count = min(step, c.shape[0] - start)
            block[:count] = c[start : start + count]  # rows left over in the last block: ignored
            best = keys.new_empty(q.shape[0], min(k, keys.shape[1] + count))
            for rows in _query_blocks(q.shape[0]):
                scores = (queries[rows] @ block.T)[:, :count]
                invalid |= scores.isnan().any()
                merged = torch.cat([keys[rows], _pack(scores, start)], dim=1)
                best[rows] = merged.topk(best.shape[1], dim=1, sorted=True).values
            keys = best
        if bool(invalid):
            raise ValueError("a score is NaN: the queries or the candidates hold NaN or infinity")
        return _unpack(keys)


def _check(q: torch.Tensor, c: torch.Tensor, k: int, chunk: int) -> None:
    for name, tensor in (("q", q), ("c", c)):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if q.shape[1] != c.shape[1]:
        raise ValueError(f"q has {q.shape[1]} columns and c has {c.shape[1]}: they must agree")
    if q.device != c.device:
        raise ValueError(f"q is on {q.device} and c on {c.device}: they must be on one device")
    if c.shape[0] > _LOW_WORD:
        raise ValueError(f"c has {c.shape[0]} rows; at most {_LOW_WORD} are supported")
    if not 1 <= k <= c.shape[0]:
        raise ValueError(f"k is {k}, but must be 1 … {c.shape[0]} (the number of candidates)")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _query_blocks(rows: int) -> list[slice]:
    """Blocks of equal height, the last one overlapping its neighbour.

    A low last block would be multiplied by another routine, with another rounding, and a query's
    scores would depend on its place in the batch.
    """
    if rows <= _QUERY_BLOCK:
        return [slice(0, rows)]
    starts = [*range(0, rows - _QUERY_BLOCK, _QUERY_BLOCK), rows - _QUERY_BLOCK]
    return [slice(start, start + _QUERY_BLOCK) for start in starts]


def _pack(scores: torch.Tensor, start: int) -> torch.Tensor:
    """One int64 per score: larger means a larger score, or an equal one at a lower index."""
    # + 0.0 turns -0.0 into 0.0: the two are equal as numbers but not as bits.
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats, as signed integers
    positions = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (ordered.long() << 32) | (_LOW_WORD - positions)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_WORD - (keys & _LOW_WORD)
