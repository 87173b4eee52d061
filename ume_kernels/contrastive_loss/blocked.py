"""The contrastive log-sum-exp in plain PyTorch, by tiles of bounded size; any device and dtype.

With the scores ``s_ij = scale q_i.p_j q_inv_i p_inv_j`` of the pairs that count (`Pairs`):
``row_lse_i = log sum_j exp s_ij`` and ``col_lse_j = log sum_i exp s_ij`` from one pass over the
tiles, each merged into running (maximum, sum) pairs. The backward computes the tiles once more.
Neither ever holds more than one tile of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ume_kernels.contrastive_loss.pairs import (
    LseOutput,
    Pairs,
    accumulation_dtype,
    finish,
    scale_gradient,
)

Tensor = torch.Tensor

TILE_CPU = (1024, 1024)
TILE_CUDA = (4096, 4096)
"""Rows and columns of a tile: large enough for the matrix product to run at full speed."""


def forward(
    q: Tensor,
    p: Tensor,
    q_inv: Tensor | None,
    p_inv: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    columns: bool,
    hardest: bool,
) -> LseOutput:
    """One pass over the tiles of ``q [N, D]`` and ``p [M, D]``; see `LseOutput`."""
    dtype, device = accumulation_dtype(q.dtype), q.device
    n, m = q.shape[0], p.shape[0]
    row_lse = torch.full((n,), -torch.inf, dtype=dtype, device=device)
    pos = row_lse.clone()
    columns_running = _Running(m if columns else 0, dtype, device)
    hard = row_lse.clone() if hardest else row_lse.new_empty(0)
    index = torch.full((n if hardest else 0,), -1, dtype=torch.int64, device=device)
    for rows in _slices(n, _tile(device)[0]):
        a = _unit(q, q_inv, rows) * scale
        strip = _Strip(pairs, rows)
        running = _Running(rows.stop - rows.start, dtype, device)
        for cols in _slices(m, _tile(device)[1]):
            s = a @ _unit(p, p_inv, cols).T
            tile = strip.tile(cols)
            at = tile.rows_with_positive()
            pos[at] = tile.positives(s)
            in_rows = _where(s, tile.row_pairs(s))
            running.add(in_rows, 1)
            if columns:
                columns_running.add(_where(s, tile.column_pairs(s)), 0, cols)
            if hardest:
                rivals = in_rows.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                tile.positives(rivals).fill_(-torch.inf)
                best = rivals.argmax(1)  # the first of equals
                score = rivals.gather(1, best[:, None])[:, 0]
                better = score > hard[rows]  # strict: a tie stays with the earlier tile
                hard[rows] = torch.where(better, score, hard[rows])
                index[rows] = torch.where(better, best + cols.start, index[rows])
        row_lse[rows] = running.lse()
    return LseOutput(row_lse, columns_running.lse(), pos, hard, index)


def backward(
    q: Tensor,
    p: Tensor,
    q_inv: Tensor | None,
    p_inv: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    row_lse: Tensor,
    col_lse: Tensor,
    g_row: Tensor,
    g_col: Tensor | None,
    g_pos: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dp, dscale)`` in the dtypes of q, p and the accumulation, from the gradients of
    ``row_lse``, ``col_lse`` (None: not asked for in the forward) and ``pos``.

    A row or column without pairs has lse -inf and adds nothing, whatever its gradient is.
    """
    dtype, device = accumulation_dtype(q.dtype), q.device
    row_shift, col_shift = _shift(row_lse), _shift(col_lse)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    gp = torch.zeros(p.shape, dtype=dtype, device=device)
    dscale = torch.zeros((), dtype=dtype, device=device)
    for rows in _slices(q.shape[0], _tile(device)[0]):
        a = _unit(q, q_inv, rows)
        strip = _Strip(pairs, rows)
        gq = torch.zeros(a.shape, dtype=dtype, device=device)
        for cols in _slices(p.shape[0], _tile(device)[1]):
            b = _unit(p, p_inv, cols)
            s = (a * scale) @ b.T
            tile = strip.tile(cols)
            t = torch.exp(_where(s, tile.row_pairs(s)) - row_shift[rows, None])
            t *= g_row[rows, None]
            if g_col is not None:
                t += torch.exp(_where(s, tile.column_pairs(s)) - col_shift[cols]) * g_col[cols]
            tile.positives(t).add_(g_pos[tile.rows_with_positive()])
            gq += t @ b
            gp[cols] += t.T @ a
        if q_inv is not None:
            gq *= q_inv[rows, None]
        dscale += scale_gradient(q[rows], gq)
        gq *= scale
        dq[rows] = finish(q[rows], None if q_inv is None else q_inv[rows], gq)
    gp *= scale if p_inv is None else scale * p_inv[:, None]
    return dq, finish(p, p_inv, gp), dscale


def _tile(device: torch.device) -> tuple[int, int]:
    return TILE_CPU if device.type == "cpu" else TILE_CUDA


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _unit(x: Tensor, inv: Tensor | None, rows: slice) -> Tensor:
    wide = x[rows].to(accumulation_dtype(x.dtype))
    return wide if inv is None else wide * inv[rows, None]


def _where(s: Tensor, counted: Tensor | None) -> Tensor:
    return s if counted is None else s.masked_fill(~counted, -torch.inf)


def _shift(lse: Tensor) -> Tensor:
    # exp(s - inf) is 0: what had no pairs gets no gradient.
    return lse.masked_fill(lse == -torch.inf, torch.inf)


class _Running:
    """log-sum-exp of ``count`` rows or columns whose scores arrive tile by tile."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self._max = torch.full((count,), -torch.inf, dtype=dtype, device=device)
        self._sum = torch.zeros(count, dtype=dtype, device=device)

    def add(self, s: Tensor, dim: int, at: slice = slice(None)) -> None:
        """Merge a tile's scores, reduced over `dim`, into the entries `at`."""
        # amax and maximum hand NaN on, and inf - inf makes one: bad inputs stay visible.
        new = torch.maximum(self._max[at], s.amax(dim))
        shift = new.masked_fill(new == -torch.inf, 0)
        total = torch.exp(s - shift.unsqueeze(dim)).sum(dim)
        self._sum[at] = self._sum[at] * torch.exp(self._max[at] - shift) + total
        self._max[at] = new

    def lse(self) -> Tensor:
        return self._max + self._sum.log()


class _Strip:
    """The pairs of some rows, with their part of the ignore list."""

    def __init__(self, pairs: Pairs, rows: slice) -> None:
        self._pairs, self._rows = pairs, rows
        self._ignored: tuple[Tensor, Tensor] | None = None
        if pairs.ignore_start is not None and pairs.ignore_col is not None:
            start = pairs.ignore_start[rows.start : rows.stop + 1]
            first, last = int(start[0]), int(start[-1])
            if last > first:
                local = torch.arange(rows.stop - rows.start, device=start.device)
                entry_rows = local.repeat_interleave(start.diff(), output_size=last - first)
                self._ignored = entry_rows, pairs.ignore_col[first:last].long()

    def tile(self, cols: slice) -> _Tile:
        ignored = None
        if self._ignored is not None:
            entry_rows, entry_cols = self._ignored
            inside = (entry_cols >= cols.start) & (entry_cols < cols.stop)
            shape = (self._rows.stop - self._rows.start, cols.stop - cols.start)
            ignored = torch.zeros(shape, dtype=torch.bool, device=entry_cols.device)
            ignored[entry_rows[inside], entry_cols[inside] - cols.start] = True
        return _Tile(self._pairs, self._rows, cols, ignored)


@dataclass(frozen=True)
class _Tile:
    """Which pairs of one tile count."""

    pairs: Pairs
    rows: slice
    cols: slice
    ignored: Tensor | None

    def _diagonal(self) -> tuple[int, int, int]:
        """``[first, last)`` of the tile's rows with a positive in it; its column is row - shift."""
        shift = self.cols.start - self.pairs.offset - self.rows.start
        first = max(0, shift)
        stop = min(self.rows.stop - self.rows.start, self.cols.stop - self.cols.start + shift)
        return first, max(first, stop), shift

    def rows_with_positive(self) -> slice:
        """Rows of the whole matrix whose positive lies in the tile."""
        first, last, _ = self._diagonal()
        return slice(self.rows.start + first, self.rows.start + last)

    def positives(self, s: Tensor) -> Tensor:
        """View of the positives' elements of a tensor of the tile's shape."""
        first, last, shift = self._diagonal()
        return s[first:last, max(first - shift, 0) : max(last - shift, 0)].diagonal()

    def row_pairs(self, s: Tensor) -> Tensor | None:
        """Pairs in the row direction, None for all."""
        pairs = self.pairs
        mask = None if pairs.col_mask is None else pairs.col_mask[self.cols]
        limit = None if pairs.row_limit is None else pairs.row_limit[self.rows, None]
        return self._counted(s, mask, limit)

    def column_pairs(self, s: Tensor) -> Tensor | None:
        """Pairs in the column direction, None for all."""
        pairs = self.pairs
        mask = None if pairs.row_mask is None else pairs.row_mask[self.rows, None]
        limit = None if pairs.col_limit is None else pairs.col_limit[self.cols]
        return self._counted(s, mask, limit)

    def _counted(self, s: Tensor, mask: Tensor | None, limit: Tensor | None) -> Tensor | None:
        counted = None
        if limit is not None:
            counted = s <= limit
            self.positives(counted).fill_(True)
        if mask is not None:
            counted = mask.expand_as(s) if counted is None else counted & mask
        if self.pairs.row_group is not None and self.pairs.col_group is not None:
            same = self.pairs.row_group[self.rows, None] == self.pairs.col_group[self.cols]
            counted = same if counted is None else counted & same
        if self.ignored is not None:
            counted = ~self.ignored if counted is None else counted & ~self.ignored
        return counted
