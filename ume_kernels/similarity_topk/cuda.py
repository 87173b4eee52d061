"""The fused top-k scan by the CUDA C++ kernels; see ``blocked`` for the definition.

The candidates are divided into splits. A block scans one split for 128 queries and keeps the best
keys of each; PyTorch merges the splits' keys. Scores never reach memory.
"""

from __future__ import annotations

import torch

from ume_kernels import cuda_backend, native
from ume_kernels.matrices import address, matrix

check = cuda_backend.check

MAX_K = 128
"""Most results per query."""

TILE_QUERIES = 128
"""Queries of a block."""

TILE_CANDIDATES = 256
"""Candidates of the widest tile: a split with fewer would only wait."""

QUERY_BLOCK = 16384
"""Queries of a launch: bounds the buffers."""

CANDIDATE_BLOCK = 1 << 30
"""Candidates of a launch: positions within one are 32-bit."""


def scan(
    q: torch.Tensor,
    c: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    *,
    q_inv: torch.Tensor | None = None,
    c_inv: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the candidates ``c`` into the best keys so far.

    Args:
        q: queries ``[Q, D]``, of which ``check`` has nothing to say.
        c: candidates ``[n, D]``; row j has the index ``first + j``.
        keys: int64 ``[Q, k]``, ``k <= 128``.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores.
        allowed: bool ``[n]`` or ``[Q, n]``: the pairs that count.

    Returns:
        ``(keys [Q, k], has_nan)``; the keys in no order, and a 0-d bool whether a score that
        counts is NaN.

    Raises:
        ValueError: more than 128 results per query.
        RuntimeError: a launch fails, with its name and CUDA's reason.
    """
    if keys.shape[1] > MAX_K:
        raise ValueError(f"k is {keys.shape[1]}, but at most {MAX_K} are fused")
    invalid = torch.zeros(1, dtype=torch.int32, device=q.device)
    if allowed is not None and allowed.shape[-1] > 1 and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    for start in range(0, c.shape[0], CANDIDATE_BLOCK):
        part = slice(start, min(start + CANDIDATE_BLOCK, c.shape[0]))
        best = torch.empty_like(keys, memory_format=torch.contiguous_format)
        for at in range(0, q.shape[0], QUERY_BLOCK):
            rows = slice(at, min(at + QUERY_BLOCK, q.shape[0]))
            mask = allowed
            if mask is not None:
                mask = mask[part] if mask.ndim == 1 else mask[rows, part]
            best[rows] = _scan_block(
                q[rows], c[part], first + start, keys[rows].contiguous(),
                None if q_inv is None else q_inv[rows].contiguous(),
                None if c_inv is None else c_inv[part].contiguous(), mask, invalid,
            )  # fmt: skip
        keys = best
    return keys, invalid[0] != 0


def _scan_block(
    q: torch.Tensor,
    c: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    q_inv: torch.Tensor | None,
    c_inv: torch.Tensor | None,
    allowed: torch.Tensor | None,
    invalid: torch.Tensor,
) -> torch.Tensor:
    kernels = native.require()
    queries, k = keys.shape
    with torch.cuda.device(q.device):
        properties = torch.cuda.get_device_properties(q.device)
        places = properties.multi_processor_count * kernels.similarity_topk_blocks_cuda()
        blocks = -(-queries // TILE_QUERIES)
        splits = count_splits(blocks, -(-c.shape[0] // TILE_CANDIDATES), places)
        found = keys.new_empty(queries, splits, k)
        buffer = keys.new_empty(blocks * TILE_QUERIES, splits, kernels.TOPK_CAPACITY_CUDA)
        kernels.similarity_topk_cuda(
            matrix(q), matrix(c), address(q_inv), address(c_inv), address(allowed),
            allowed.stride(0) if allowed is not None and allowed.ndim == 2 else 0,
            first, k, address(keys), k, splits, address(buffer), address(found), address(invalid),
            cuda_backend.stream(q.device),
        )  # fmt: skip
    return torch.cat([keys, found.flatten(1)], dim=1).topk(k, dim=1, sorted=False).values


def count_splits(blocks: int, tiles: int, places: int) -> int:
    """Parts of the corpus for ``blocks`` blocks of queries on ``places`` that run at once.

    The fewest rounds of blocks that leave at most a twentieth of the places empty; in four rounds,
    as many as fit. No split is without a tile.
    """
    for rounds in range(1, 5):
        splits = rounds * places // blocks
        if splits and splits * blocks * 20 >= rounds * places * 19:
            break
    return max(1, min(splits, tiles))
