"""Rows of a score matrix in order of descending score, without ever holding the matrix.

``queries [Q, D] @ candidates [D, N]`` is computed and ordered in blocks of rows. While the rows of
one block are used, the next one is prepared by another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch

BLOCK_BYTES = 128 << 20
"""What the scores (float32) and the order (int64) of one block may take."""

RADIX_COLUMNS = 2048
"""From here on sorting the 16-bit halves one after the other is faster than sorting floats."""

MAX_THREADS = 16

_FLIP_NEGATIVE = np.int32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)


class Row(np.ndarray[Any, np.dtype[Any]]):
    """Candidates of one query, best first: int64 ``[N]``.

    An ndarray, except that iterating it yields Python integers: a list is looked up with them in
    half the time that NumPy's scalars take, and a script does it N times for each query.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist()) if self.ndim == 1 else super().__iter__()


class RankedRows:
    """Ordered rows of a product; a block at a time is in memory, and the one that follows it.

    The order is that of ``np.argsort(-(queries @ candidates), axis=1, kind="stable")``: ties go to
    the lowest index, NaN comes last. The scores are rounded as a product of this many rows is.

    Args:
        queries: float32 ``[Q, D]``. Kept, not copied: it must not change before the last use.
        candidates: float32 ``[D, N]``, likewise.
    """

    def __init__(self, queries: np.ndarray, candidates: np.ndarray) -> None:
        self.queries, self.candidates = queries, candidates
        self.shape = (queries.shape[0], candidates.shape[1])
        self.rows_per_block = max(1, BLOCK_BYTES // (12 * self.shape[1]))
        self._kept: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[Row]:
        with closing(_sorter(self)) as sorter, ThreadPoolExecutor(1, "ume-ranking") as ahead:

            def begin(start: int) -> Future[np.ndarray]:
                return ahead.submit(sorter.order, self.queries[start : start + self.rows_per_block])

            following = begin(0)
            for start in range(0, self.shape[0], self.rows_per_block):
                block = following.result()
                if start + self.rows_per_block < self.shape[0]:
                    following = begin(start + self.rows_per_block)
                for row in block:
                    yield row.view(Row)

    def row(self, index: int) -> Row:
        """Row ``0 <= index < Q``; its block is kept until another one is needed."""
        start = index - index % self.rows_per_block
        if self._kept is None or self._kept[0] != start:
            with closing(_sorter(self)) as sorter:
                block = sorter.order(self.queries[start : start + self.rows_per_block])
            self._kept = start, block
        return self._kept[1][index - start].view(Row)

    def whole(self) -> np.ndarray:
        """All rows, int64 ``[Q, N]``."""
        out = np.empty(self.shape, dtype=np.int64)
        for place, row in zip(out, self, strict=True):
            place[:] = row
        return out


class _OnCpu:
    """Scores by the BLAS of NumPy, order by several threads: NumPy's sorts use one."""

    def __init__(self, candidates: np.ndarray) -> None:
        self.candidates = candidates
        self.threads = ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS), "ume-sort")

    def order(self, queries: np.ndarray) -> np.ndarray:
        scores = np.dot(queries, self.candidates)
        if np.isnan(scores.min()):
            return np.argsort(-scores, axis=1, kind="stable")
        out = np.empty(scores.shape, dtype=np.int64)
        list(self.threads.map(_order_row, scores, out))
        return out

    def close(self) -> None:
        self.threads.shutdown()


def _order_row(scores: np.ndarray, out: np.ndarray) -> None:
    """Stable descending order of float32 ``[N]`` without NaN, into int64 ``[N]``."""
    # 0 - x and not -x: both zeros become the same zero.
    negated = np.subtract(np.float32(0), scores)
    if scores.shape[0] < RADIX_COLUMNS:
        out[:] = np.argsort(negated, kind="stable")
        return
    bits = negated.view(np.int32)
    ordered = (bits ^ ((bits >> 31) & _FLIP_NEGATIVE)).view(np.uint32) ^ _SIGN
    # NumPy's stable sort of 16-bit integers is a radix sort; of wider ones it is not.
    by_low = np.argsort(ordered.astype(np.uint16), kind="stable")
    high = (ordered >> np.uint32(16)).astype(np.uint16)
    by_high = np.argsort(high[by_low], kind="stable")
    np.take(by_low, by_high, out=out)


class _OnCuda:
    """Scores and order by PyTorch on the GPU the script uses already."""

    def __init__(self, candidates: np.ndarray) -> None:
        # [N, D] is contiguous in the scripts, which rank against a transposed view.
        self.candidates = torch.from_numpy(np.ascontiguousarray(candidates.T)).cuda()
        self.device = self.candidates.device

    def order(self, queries: np.ndarray) -> np.ndarray:
        # Threads have a current device and gradient mode of their own.
        with torch.cuda.device(self.device), torch.no_grad():
            rows = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
            negated = 0.0 - rows @ self.candidates.T
            order: np.ndarray = torch.sort(negated, dim=1, stable=True).indices.cpu().numpy()
            return order

    def close(self) -> None:
        del self.candidates


def _sorter(rows: RankedRows) -> _OnCpu | _OnCuda:
    if _gpu_has_room(rows):
        try:
            return _OnCuda(rows.candidates)
        except torch.OutOfMemoryError:
            pass
    return _OnCpu(rows.candidates)


def _gpu_has_room(rows: RankedRows) -> bool:
    """Whether CUDA is in use here, multiplies float32 in full, and has memory for it."""
    if not torch.cuda.is_initialized():
        return False
    try:
        in_full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer interface: per operation
        in_full = False
    if not in_full or torch.backends.cuda.matmul.allow_tf32:
        return False
    # The sort holds its input, both outputs and as much again as scratch.
    needed = rows.candidates.nbytes + 4 * BLOCK_BYTES
    free, _ = torch.cuda.mem_get_info()
    return needed < free
