"""Eager PyTorch: block by block, never holding the ``Q x N`` score matrix; any k, any device.

Blocks of candidates are scored with one matrix product and packed into keys; the best keys so far
and the new ones are merged by a plain ``topk``. How a candidate's score stays independent of its
place is told in ``reference``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ume_kernels.similarity_topk import keys as key_format
from ume_kernels.similarity_topk.reference import inverse_norm, padded, whole_tiles

CANDIDATES = 4096
"""Candidates scored at a time."""

_QUERIES = 256
_GROUP = 8
_PAIR_BYTES = 32 << 20


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

    Working memory is about ``4 D`` bytes for each of 4096 candidates and ``12 max(4096, k)`` for
    each of at most 2048 queries.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[n, D]``, likewise, on the same device.
        first: index of ``c[0]`` in the corpus.
        keys: int64 ``[Q, k]``, see ``keys``.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores, 1 if None.
        allowed: bool ``[n]`` or ``[Q, n]``: the candidates that count.

    Returns:
        The new keys, in descending order, and bool ``[]``: whether a score that counts is NaN.
    """
    invalid = torch.zeros((), dtype=torch.bool, device=q.device)
    if not q.shape[0] or not c.shape[0]:
        return keys, invalid
    queries = q.float().contiguous()
    merged = torch.empty_like(keys)
    k = keys.shape[1]
    span = max(CANDIDATES, k)
    step = min(CANDIDATES, whole_tiles(c.shape[0]))
    for group in _groups(q.shape[0]):
        rows = slice(group[0].start, group[-1].stop)
        # from the old keys, not from `merged`: neighbouring groups overlap
        running = keys[rows]
        for start in range(0, c.shape[0], span):
            stop = min(start + span, c.shape[0])
            fresh = keys.new_empty(running.shape[0], stop - start)
            for low in range(start, stop, step):
                high = min(low + step, stop)
                wide = padded(c[low:high], step)
                places = torch.arange(first + low, first + high, device=c.device)
                for part in group:
                    scores = (queries[part] @ wide.T)[:, : high - low]
                    if q_inv is not None:
                        scores = scores * q_inv[part, None]
                    if c_inv is not None:
                        scores = scores * c_inv[low:high]
                    packed = key_format.pack(scores, places)
                    bad = scores.isnan()
                    if allowed is not None:
                        mask = (
                            allowed[..., low:high]
                            if allowed.ndim == 1
                            else (allowed[part, low:high])
                        )
                        bad &= mask
                        packed.masked_fill_(~mask, key_format.EMPTY)
                    invalid |= bad.any()
                    inside = slice(part.start - rows.start, part.stop - rows.start)
                    fresh[inside, low - start : high - start] = packed
            running = key_format.best(torch.cat([running, fresh], dim=1), k)
        merged[rows] = running
    return merged, invalid


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of a list of candidates per query.

    Working memory is about 32 MiB and a few numbers per pair.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[n, D]``, likewise, on the same device.
        offsets: int64 ``[Q + 1]``: query i has the candidates ``rows[offsets[i]:offsets[i + 1]]``.
        rows: int64 ``[E]``, rows of ``c``.
        k: keys per query.
        first: index of ``c[0]`` in the corpus.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores, 1 if None.

    Returns:
        Keys ``[Q, k]``, EMPTY where a list is shorter, and bool ``[]``: whether a score is NaN.
    """
    invalid = torch.zeros((), dtype=torch.bool, device=q.device)
    keys = torch.empty_like(rows)
    owner = key_format.owners(offsets, rows.shape[0])
    # The sum along a row takes the same order in every row, but for a matrix of a single one. So
    # all blocks are of one height, the last one filled up with its last pair.
    step = max(2, min(_PAIR_BYTES // max(1, 12 * q.shape[1]), rows.shape[0]))
    for start in range(0, rows.shape[0], step):
        stop = min(start + step, rows.shape[0])
        pick = torch.arange(start, start + step, device=q.device).clamp_max_(stop - 1)
        query, row = owner[pick], rows[pick]
        scores = (q[query].float() * c[row].float()).sum(dim=1)
        if q_inv is not None:
            scores = scores * q_inv[query]
        if c_inv is not None:
            scores = scores * c_inv[row]
        invalid |= scores.isnan().any()
        keys[start:stop] = key_format.pack(scores, first + row)[: stop - start]
    return key_format.best_of_segments(keys, offsets, k), invalid


def inverse_norms(matrix: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """``reference.inverse_norm`` of a matrix of any dtype, float32 ``[n]``, no copy of it held.

    With ``rows``, int64, only those are computed; the others are 0.
    """
    count = matrix.shape[0]
    found = torch.zeros(count, dtype=torch.float32, device=matrix.device)
    picked = None if rows is None or rows.shape[0] >= count else rows.unique()
    for start in range(0, count if picked is None else picked.shape[0], CANDIDATES):
        part = slice(start, start + CANDIDATES)
        where: slice | torch.Tensor = part if picked is None else picked[part]
        content = matrix[where]
        found[where] = inverse_norm(padded(content))[: content.shape[0]]
    return found


def _groups(rows: int) -> Iterator[list[slice]]:
    """Blocks of queries of equal height, the last one overlapping its neighbour, in groups.

    A low last block would be multiplied by another routine, with another rounding, and a query's
    scores would depend on its place in the batch.
    """
    if rows <= _QUERIES:
        yield [slice(0, rows)]
        return
    starts = [*range(0, rows - _QUERIES, _QUERIES), rows - _QUERIES]
    for number in range(0, len(starts), _GROUP):
        yield [slice(start, start + _QUERIES) for start in starts[number : number + _GROUP]]
