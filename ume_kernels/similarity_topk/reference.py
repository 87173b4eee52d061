"""Top-k by inner product: the definition, with the whole score matrix in memory.

    s[i, j] = <q_i, c_j>                                  accumulated and kept in float32
              / (max(|q_i|, 1e-12) max(|c_j|, 1e-12))     where normalize
    indices[i] = the k largest of s[i], equal scores in the order of their index

A candidate's score must not depend on where it stands, or two equal candidates would no longer
tie. BLAS libraries break this at the edges (columns that do not fill a register tile, very narrow
products) and for unusual strides, where the sum is taken in another order. So the product is taken
over a fresh contiguous matrix whose rows are a multiple of ``TILE``, with zero rows as filling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

TILE = 256


def whole_tiles(rows: int) -> int:
    """``rows`` rounded up to a multiple of ``TILE``."""
    return -(-rows // TILE) * TILE


def padded(rows: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """``rows`` as a fresh float32 matrix of ``count`` rows, else of whole tiles."""
    count = whole_tiles(rows.shape[0]) if count is None else count
    filled = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    filled[: rows.shape[0]] = rows
    return filled


def inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """``1 / max(|row|, 1e-12)`` of float32 rows; NaN where the norm is not finite.

    An infinite norm would turn every score into a plausible 0.
    """
    norm = torch.linalg.vector_norm(rows, dim=1)
    return norm.clamp_min(1e-12).reciprocal().masked_fill(norm.isinf(), float("nan"))


def similarity_topk_reference(
    q: torch.Tensor,
    c: torch.Tensor,
    k: int,
    *,
    normalize: bool = False,
    segments: Sequence[torch.Tensor] | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` candidates with the largest inner product, best first.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[N, D]``, ``N >= k``.
        k: results per query.
        normalize: cosine instead of inner product.
        segments: int64 rows of ``c``, different ones, that each query ranks; all if None.
        allowed: bool ``[N]`` or ``[Q, N]``, the candidates that may be returned.

    Returns:
        ``(scores [Q, k] float32, indices [Q, k] int64)``; −inf and −1 where a query has fewer
        than ``k`` candidates.
    """
    wide = padded(c)
    scores = (q.float() @ wide.T)[:, : c.shape[0]]
    if normalize:
        inverse = inverse_norm(wide)[: c.shape[0]]
        scores = scores * inverse_norm(padded(q))[: q.shape[0], None] * inverse
    present = torch.ones_like(scores, dtype=torch.bool)
    if allowed is not None:
        present &= allowed
    if segments is not None:
        listed = torch.zeros_like(present)
        for row, rows in zip(listed, segments, strict=True):
            row[rows] = True
        present &= listed
    # By presence after score: an absent candidate stands behind a present one that scores -inf.
    ranked, order = scores.masked_fill(~present, float("-inf")).sort(
        dim=1, descending=True, stable=True
    )
    behind = present.gather(1, order).logical_not().to(torch.int8).argsort(dim=1, stable=True)
    ranked, order = ranked.gather(1, behind), order.gather(1, behind)
    absent = present.gather(1, order).logical_not()
    return ranked[:, :k].contiguous(), order.masked_fill(absent, -1)[:, :k].contiguous()
