"""Top-k by inner product: the definition, with the whole score matrix in memory.

    s[i, j] = <q_i, c_j>                                  accumulated and kept in float32
    indices[i] = the k largest of s[i], equal scores in the order of their index

A candidate's score must not depend on where it stands, or two equal candidates would no longer
tie. BLAS libraries break this at the edges (columns that do not fill a register tile, very narrow
products) and for unusual strides, where the sum is taken in another order. So the product is taken
over a fresh contiguous matrix whose rows are a multiple of ``TILE``, with zero rows as filling.
"""

from __future__ import annotations

import torch

TILE = 256


def whole_tiles(rows: int) -> int:
    """``rows`` rounded up to a multiple of ``TILE``."""
    return -(-rows // TILE) * TILE


def similarity_topk_reference(
    q: torch.Tensor, c: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` candidates with the largest inner product, best first.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[N, D]``, ``N >= k``.
        k: results per query.

    Returns:
        ``(scores [Q, k] float32, indices [Q, k] int64)``.
    """
    padded = torch.zeros(whole_tiles(c.shape[0]), c.shape[1], device=c.device)
    padded[: c.shape[0]] = c
    scores = (q.float() @ padded.T)[:, : c.shape[0]]
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    return ranked[:, :k].contiguous(), order[:, :k].contiguous()
