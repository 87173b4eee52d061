"""Triton kernel that scans a corpus for the best inner products of each query, and its launcher.

A program owns a block of queries and a split of the corpus. It walks the split in ascending tiles
and keeps, per query, a threshold: the k-th best score that it knows of. What passes is appended to
a buffer that nobody else touches; when a buffer fills up it is cut to its k best, which raises the
threshold. Scores never reach memory, and nothing is atomic: the same input gives the same bits.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from ume_kernels.aot import Budget
from ume_kernels.matrices import row_stride, rows_contiguous
from ume_kernels.similarity_topk.keys import EMPTY
from ume_kernels.triton_tiles import as_bytes, inner_products
from ume_kernels.tuning import config

SCAN_BUDGET = Budget(registers=255, shared=110_000, blocks_per_sm=1)
BITS_BUDGET = Budget(registers=64, shared=4_096, blocks_per_sm=8)

MAX_K = 128
"""Most results per query."""

_EMPTY = tl.constexpr(EMPTY)
_LOWEST = tl.constexpr(-(1 << 31))  # score of no candidate, in the order below
_NAN = tl.constexpr((1 << 31) - 1)
_LOW_WORD = tl.constexpr(0xFFFFFFFF)
_NO_COLUMN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(score):
    """float32 as int32 in the same order, -0.0 as 0.0, every NaN at the top."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, _NAN, bits)


@triton.jit
def _kth_largest(values, k):
    """The k-th largest of each row of int32 ``values``, the lowest int32 if there are fewer.

    Bit by bit from the top: the largest bound that k values reach.
    """
    reached = tl.sum((values >= 0).to(tl.int32), axis=1) >= k
    bound = tl.where(reached, 0, _LOWEST).to(tl.int32)
    step = tl.full([1], 1 << 30, tl.int32)
    for _ in range(31):
        higher = bound + step
        reached = tl.sum((values >= higher[:, None]).to(tl.int32), axis=1) >= k
        bound = tl.where(reached, higher, bound)
        step = step >> 1
    return bound


@triton.jit
def _start(key, first):
    """Score that a candidate from ``first`` on must exceed to beat ``key`` of the running best.

    It loses a tie if the key's index is lower, as it is when a corpus is scanned in order.
    """
    index = _LOW_WORD - (key & _LOW_WORD)
    score = (key >> 32).to(tl.int32)
    return tl.where((key != _EMPTY) & (index >= first), score - 1, score)


@triton.jit
def _cut(rows_ptr, exists, k, CAP: tl.constexpr, ROWS: tl.constexpr):
    """Leave the k best keys of each buffer, in front; returns the score of the k-th.

    The barriers are between loads and stores of the same places by different threads.
    """
    slot = tl.arange(0, CAP)[None, :]
    exists = exists[:, None]
    keys = tl.load(rows_ptr[:, None] + slot, mask=exists, other=_EMPTY)
    score = (keys >> 32).to(tl.int32)
    bound = _kth_largest(score, k)
    tied = score == bound[:, None]
    low = tl.where(tied, ((keys & _LOW_WORD) + _LOWEST).to(tl.int32), _LOWEST)
    above = tl.sum((score > bound[:, None]).to(tl.int32), axis=1)
    least = tl.full([ROWS], _LOWEST, tl.int32)
    if tl.max(above + tl.sum(tied.to(tl.int32), axis=1), axis=0) > k:
        # equal scores at the end of the list: those with the lowest indices stay
        least = _kth_largest(low, k - above)
    keep = ((score > bound[:, None]) | (tied & (low >= least[:, None]))) & (keys != _EMPTY)
    place = tl.cumsum(keep.to(tl.int32), axis=1) - 1
    tl.debug_barrier()
    tl.store(rows_ptr[:, None] + slot, tl.full([ROWS, CAP], _EMPTY, tl.int64), mask=exists)
    tl.debug_barrier()
    tl.store(rows_ptr[:, None] + place, keys, mask=keep & exists)
    return bound


@triton.jit(do_not_specialize=["width"])
def _bits_kernel(bits_ptr, mask_ptr, bits_stride, mask_stride, width, WORDS: tl.constexpr) -> None:
    """A row of bytes ``[width]`` as bits, the lowest first; 0 beyond its end."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    at = word[:, None] * 32 + lane[None, :]
    byte = tl.load(mask_ptr + row * mask_stride + at, mask=at < width, other=0)
    bit = (byte != 0).to(tl.int32) << lane[None, :]
    tl.store(bits_ptr + row * bits_stride + word, tl.sum(bit, axis=1), mask=word < bits_stride)


@triton.jit(do_not_specialize=["queries", "candidates", "first", "k", "tiles_per_split"])
def _scan_kernel(
    buffer_ptr,
    threshold_ptr,
    has_nan_ptr,
    worst_ptr,
    q_ptr,
    c_ptr,
    q_inv_ptr,
    c_inv_ptr,
    allowed_ptr,
    bits_ptr,
    q_stride,
    c_stride,
    bits_stride,
    buffer_stride,
    queries,
    candidates,
    first,
    k,
    D,
    tiles_per_split,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CUT_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Append ``(score, index)`` keys that may be among a query's k best to its buffer.

    A row of ``buffer_ptr`` holds the query's k best keys so far and CAP places for every split, all
    EMPTY at first; ``worst_ptr`` holds the least of the k, ``threshold_ptr`` ``[splits, queries]``
    is scratch. All query blocks of a split are neighbours in the grid, so that they read its tiles
    from L2 together.
    """
    query_blocks = tl.cdiv(queries, BLOCK_M)
    block, split = tl.program_id(0) % query_blocks, tl.program_id(0) // query_blocks
    local = tl.arange(0, BLOCK_M)
    wide_row = block * BLOCK_M + local
    inside = wide_row < queries
    row = tl.minimum(wide_row, queries - 1)
    owned = split.to(tl.int64) * queries
    buffer_ptr += k + split * CAP
    bound = _start(tl.load(worst_ptr + row), first)
    count = tl.zeros([BLOCK_M], tl.int32)
    bad = tl.zeros([BLOCK_M], tl.int32)

    tiles = tl.cdiv(candidates, BLOCK_N)
    stop = tl.minimum((split + 1) * tiles_per_split, tiles)
    for tile in range(split * tiles_per_split, stop):
        if tl.max(count, axis=0) > CAP - BLOCK_N:
            # What this block's threads stored is read back by others of them.
            tl.debug_barrier()
            for part in range(0, BLOCK_M, CUT_ROWS):
                here = (local >= part) & (local < part + CUT_ROWS)
                if tl.max(tl.where(here, count, 0), axis=0) > CAP - BLOCK_N:
                    mine = block * BLOCK_M + part + tl.arange(0, CUT_ROWS)
                    exists = mine < queries
                    rows_ptr = buffer_ptr + mine.to(tl.int64) * buffer_stride
                    kth = _cut(rows_ptr, exists, k, CAP, CUT_ROWS)
                    tl.store(threshold_ptr + owned + mine, kth, mask=exists)
                    tl.debug_barrier()
                    raised = tl.load(threshold_ptr + owned + row, mask=here & inside, other=_LOWEST)
                    bound = tl.maximum(bound, raised)
                    count = tl.where(here, tl.minimum(count, k), count)
            tl.debug_barrier()

        wide_col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        col = tl.minimum(wide_col, candidates - 1)
        s = inner_products(
            q_ptr, c_ptr, block * BLOCK_M, tile * BLOCK_N, queries, candidates, q_stride, c_stride,
            D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STAGES,
        )  # fmt: skip
        if q_inv_ptr is not None:
            s *= tl.load(q_inv_ptr + row)[:, None]
        if c_inv_ptr is not None:
            s *= tl.load(c_inv_ptr + col)[None, :]
        score = _ordered(s)
        column_counts = wide_col < candidates
        if allowed_ptr is not None:
            column_counts &= tl.load(allowed_ptr + col) != 0
        score = tl.where(inside[:, None] & column_counts[None, :], score, _LOWEST)
        if bits_ptr is not None:
            # a few words of each row, not a byte of each pair: addresses would fill the registers
            words_ptr = bits_ptr + row.to(tl.int64) * bits_stride + tile * (BLOCK_N // 32)
            lane = tl.arange(0, BLOCK_N)[None, :]
            word = tl.load(words_ptr)[:, None]
            for i in tl.static_range(1, BLOCK_N // 32):
                word = tl.where(lane // 32 == i, tl.load(words_ptr + i)[:, None], word)
            score = tl.where(((word >> (lane % 32)) & 1) != 0, score, _LOWEST)

        top = tl.max(score, axis=1)
        bad |= (top == _NAN).to(tl.int32)
        # The best that is left of every query, until none passes: one or two rounds but at first.
        while tl.max((top > bound).to(tl.int32), axis=0) > 0:
            passes = top > bound
            best = tl.min(tl.where(score == top[:, None], wide_col[None, :], _NO_COLUMN), axis=1)
            index = _LOW_WORD - (best.to(tl.int64) + first)
            free_ptr = buffer_ptr + wide_row.to(tl.int64) * buffer_stride + count
            tl.store(free_ptr, (top.to(tl.int64) << 32) | index, mask=passes & inside)
            count += passes.to(tl.int32)
            score = tl.where(wide_col[None, :] == best[:, None], _LOWEST, score)
            top = tl.max(score, axis=1)
    tl.store(has_nan_ptr + tl.program_id(0), tl.max(bad, axis=0))


# --------------------------------------------------------------------------------- launcher

QUERY_BLOCK = 16384
"""Queries of a launch: bounds the buffers."""

BITS_WORDS = 64
"""Words of a program that turns masks into bits."""

SAMPLE = 65536
"""Candidates scanned before the rest of a large corpus, to start from useful thresholds."""

COPIED = 1 << 18
"""Candidates widened or made contiguous at a time, where that is necessary."""


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
        q: queries ``[Q, D]``.
        c: candidates ``[n, D]``; row j has the index ``first + j``. Of different dtypes the wider
            is used for both, which copies the other.
        keys: int64 ``[Q, k]``, ``k <= 128``: score above, complement of the index below; EMPTY.
        q_inv, c_inv: float32 ``[Q]``, ``[n]``: factors of the scores.
        allowed: bool ``[n]`` or ``[Q, n]``: the pairs that count.

    Returns:
        ``(keys [Q, k], has_nan)``; the keys in no order, and a 0-d bool whether a score that
        counts is NaN, in which case the keys mean nothing.
    """
    n, k = c.shape[0], keys.shape[1]
    if k > MAX_K:
        raise ValueError(f"k is {k}, but at most {MAX_K} are fused")
    has_nan = torch.zeros((), dtype=torch.bool, device=q.device)
    if n == 0 or q.shape[0] == 0:
        return keys, has_nan
    dtype = torch.promote_types(q.dtype, c.dtype)
    q = rows_contiguous(q.to(dtype))
    for start, stop in _parts(n, c.dtype != dtype or rows_contiguous(c) is not c):
        part = slice(start, stop)
        block = rows_contiguous(c[part].to(dtype))
        factors = None if c_inv is None else c_inv[part]
        best = torch.empty_like(keys)
        for at in range(0, q.shape[0], QUERY_BLOCK):
            rows = slice(at, at + QUERY_BLOCK)
            mask = allowed
            if mask is not None:
                mask = mask[part] if mask.ndim == 1 else mask[rows, part]
            best[rows], nan = _scan_part(
                q[rows], block, first + start, keys[rows],
                None if q_inv is None else q_inv[rows], factors, mask,
            )  # fmt: skip
            has_nan |= nan
        keys = best
    return keys, has_nan


def _parts(n: int, copied: bool) -> list[tuple[int, int]]:
    """Ranges of candidates for a launch each; smaller where each is copied first."""
    cuts = [0, SAMPLE] if n > 8 * SAMPLE else [0]
    step = COPIED if copied else 1 << 30  # positions inside a part are 32-bit
    cuts += [*range(cuts[-1] + step, n, step), n]
    return list(pairwise(cuts))


def _scan_part(
    q: torch.Tensor,
    c: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    q_inv: torch.Tensor | None,
    c_inv: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, k = keys.shape
    n, d = c.shape
    name = "scan" if allowed is None else "scan_selective"
    name = "scan_float32" if q.dtype == torch.float32 else name
    chosen = dict(config("similarity_topk", name, queries, q.device))
    blocks = triton.cdiv(queries, chosen["BLOCK_M"])
    tiles = triton.cdiv(n, chosen["BLOCK_N"])
    splits = _splits(blocks, tiles, chosen.pop("BLOCKS_PER_SM"), q.device)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    chosen["CAP"] = max(chosen["CAP"], triton.next_power_of_2(k + chosen["BLOCK_N"]))
    buffer = keys.new_full((queries, k + splits * chosen["CAP"]), EMPTY)
    buffer[:, :k] = keys
    threshold = torch.empty(splits, queries, dtype=torch.int32, device=q.device)
    has_nan = torch.empty(blocks * splits, dtype=torch.int32, device=q.device)
    mask = bits = None
    if allowed is not None and allowed.ndim == 2:
        bits = _bits(allowed, tiles * chosen["BLOCK_N"] // 32)
    elif allowed is not None:
        mask = as_bytes(allowed)
    _scan_kernel[(blocks * splits,)](
        buffer, threshold, has_nan, keys.amin(dim=1), q, c, q_inv, c_inv, mask, bits,
        row_stride(q), row_stride(c), 0 if bits is None else bits.stride(0), buffer.stride(0),
         queries, n, first, k, d, per_split,
        EVEN_K=d % chosen["BLOCK_K"] == 0, num_stages=chosen["STAGES"], **chosen,
    )  # fmt: skip
    return buffer.topk(k, dim=1, sorted=False).values, has_nan.amax() != 0


def _bits(allowed: torch.Tensor, words: int) -> torch.Tensor:
    """bool ``[Q, n]`` as int32 ``[Q, words]``, a bit for each pair."""
    mask = as_bytes(rows_contiguous(allowed))
    bits = torch.empty(mask.shape[0], words, dtype=torch.int32, device=mask.device)
    _bits_kernel[(mask.shape[0], triton.cdiv(words, BITS_WORDS))](
        bits, mask, words, row_stride(mask), mask.shape[1], WORDS=BITS_WORDS, num_warps=4
    )
    return bits


def _splits(blocks: int, tiles: int, per_sm: int, device: torch.device) -> int:
    """Parts of the corpus: enough that all programs run at once, none without a tile."""
    places = per_sm
    if device.type == "cuda":
        places *= torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(places // blocks, tiles))
