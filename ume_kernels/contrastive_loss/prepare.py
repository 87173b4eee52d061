"""From masks as a caller gives them to the conditions that the tile pass reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ume_kernels.contrastive_loss.arguments import Selection
from ume_kernels.contrastive_loss.pairs import (
    Pairs,
    accumulation_dtype,
    inverses,
    positive_scores,
)

Tensor = torch.Tensor

MASKED = -1e4
"""Logit that the official training gives to the rows and columns that are not valid."""


@dataclass(frozen=True)
class Prepared:
    """Conditions of a pass, and how many masked columns (rows) each row (column) sees.

    A masked one in the same group and not ignored keeps the official logit of -1e4: with k of
    them ``lse = logaddexp(lse, log k - 1e4)``. None: no masks.
    """

    pairs: Pairs
    row_masked: Tensor | None = None
    col_masked: Tensor | None = None


def prepare(selection: Selection, n: int, m: int, offset: int) -> Prepared:
    """Compile `selection`; ValueError for an ignored or group-separated positive.

    Groups and pair lists are read on the host, once, as their values are checked.
    """
    s = selection
    pairs = Pairs(offset, row_mask=s.row_valid, col_mask=s.col_valid)
    row_masked = None if s.col_valid is None else (~s.col_valid).sum()
    col_masked = None if s.row_valid is None else (~s.row_valid).sum()
    if s.row_group is None and s.ignore is None:
        return Prepared(pairs, row_masked, col_masked)
    row_group, col_group, start, col, row_count, col_count = _prepare_op(
        s.row_valid, s.col_valid, s.row_group, s.col_group, s.ignore, n, m, offset
    )
    if s.row_group is not None:
        pairs = replace(pairs, row_group=row_group, col_group=col_group)
    if s.ignore is not None:
        pairs = replace(pairs, ignore_start=start, ignore_col=col)
    if s.col_valid is None:
        return Prepared(pairs)
    return Prepared(pairs, row_count, col_count)


def margin_limit(
    q: Tensor, p: Tensor, scale: Tensor, normalize: bool, offset: int, margin: float
) -> Tensor:
    """``[N]``: what a negative's score must not exceed, ``positive - margin scale``.

    Rounding is allowed for: the scores of the tiles are sums in another order, and a copy of the
    positive must not be dropped or kept by chance. No gradient.
    """
    with torch.no_grad():
        inverse = inverses(q, p, normalize)
        positive = positive_scores(q, p, *inverse, scale, offset)
        sizes: Tensor | float = 1.0
        if not normalize:
            norms = [torch.linalg.vector_norm(x, dim=-1, dtype=positive.dtype) for x in (q, p)]
            sizes = norms[0] * norms[1][offset : offset + q.shape[0]]
        rounding = 32 * torch.finfo(positive.dtype).eps * scale * sizes
        return positive - margin * scale + rounding


def with_margin(
    prepared: Prepared, q: Tensor, p: Tensor, scale: Tensor, normalize: bool, margin: float
) -> Prepared:
    """`prepared` that also drops, in each direction, what scores above positive - `margin`."""
    offset, n, m = prepared.pairs.offset, q.shape[0], p.shape[0]
    row = margin_limit(q, p, scale, normalize, offset, margin)
    col = torch.cat([row.new_full((offset,), torch.inf), row])
    col = torch.cat([col, row.new_full((m - offset - n,), torch.inf)])
    return replace(prepared, pairs=replace(prepared.pairs, row_limit=row, col_limit=col))


def poison(*inputs: Tensor | None) -> Tensor:
    """0, or NaN if an input holds NaN or infinity, which comparisons with a margin would drop."""
    with torch.no_grad():
        ends = [end * 0.0 for x in inputs if x is not None for end in (x.amax(), x.amin())]
        return torch.stack(ends).float().sum()


def slice_columns(pairs: Pairs, start: int, stop: int) -> Pairs:
    """The conditions of the columns ``[start, stop)`` alone."""

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[start:stop]

    ignore_start, ignore_col = pairs.ignore_start, pairs.ignore_col
    if ignore_start is not None and ignore_col is not None:
        kept = (ignore_col >= start) & (ignore_col < stop)
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        ignore_start, ignore_col = before[ignore_start], ignore_col[kept] - start
    return replace(
        pairs,
        offset=pairs.offset - start,
        col_mask=cut(pairs.col_mask),
        col_group=cut(pairs.col_group),
        ignore_start=ignore_start,
        ignore_col=ignore_col,
        col_limit=cut(pairs.col_limit),
    )


def add_masked(lse: Tensor, masked: Tensor | None) -> Tensor:
    """``lse`` with the mass of the masked entries, k times exp(-1e4)."""
    if masked is None:
        return lse
    return torch.logaddexp(lse, masked.to(lse.dtype).log() + MASKED)


def zero_masked(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` with zeros where it is not valid: what it holds there, NaN too, has no effect."""
    return x if valid is None else torch.where(valid.unsqueeze(-1), x, 0)


def scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    """``scale`` as a 0-d tensor in the accumulation dtype and on the device of `like`."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(scale, Tensor):
        return scale.to(like.device, dtype)
    return torch.full((), scale, dtype=dtype, device=like.device)


# An operator of its own: what is below depends on values, which torch.compile cannot trace.
@torch.library.custom_op("ume::contrastive_pairs", mutates_args=())
def _prepare_op(
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    ignore: Tensor | None,
    n: int,
    m: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = next(t.device for t in (row_group, ignore) if t is not None)
    row_of = torch.zeros(n, dtype=torch.int32, device=device)
    col_of = torch.zeros(m, dtype=torch.int32, device=device)
    if row_group is not None and col_group is not None:
        # Consecutive numbers: kernels compare int32, callers may number with 64 bits.
        ids = torch.cat([row_group.long(), col_group.long()]).unique(return_inverse=True)[1]
        row_of, col_of = ids[:n].int(), ids[n:].int()
        _check_groups(row_of, col_of, row_valid, col_valid, offset)
    row_masked = torch.zeros(n, dtype=torch.int64, device=device)
    col_masked = torch.zeros(m, dtype=torch.int64, device=device)
    if row_valid is not None and col_valid is not None:
        count = n + m  # ids are below it
        row_masked = torch.bincount(col_of[~col_valid], minlength=count)[row_of]
        col_masked = torch.bincount(row_of[~row_valid], minlength=count)[col_of]
    start = torch.zeros(n + 1, dtype=torch.int64, device=device)
    col = torch.empty(0, dtype=torch.int32, device=device)
    if ignore is not None:
        _check_ignore(ignore, n, m, offset)
        key = (ignore[:, 0] * m + ignore[:, 1]).sort().values
        row, wide = key // m, key % m
        first_of_row = torch.arange(n + 1, device=device)
        start, col = torch.searchsorted(row, first_of_row), wide.int()
        if row_valid is not None and col_valid is not None:
            counted = row_of[row] == col_of[wide]
            counted[1:] &= key[1:] != key[:-1]
            row_masked -= torch.bincount(row[counted & ~col_valid[wide]], minlength=n)
            col_masked -= torch.bincount(wide[counted & ~row_valid[row]], minlength=m)
    return row_of, col_of, start, col, row_masked, col_masked


@_prepare_op.register_fake
def _(
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    ignore: Tensor | None,
    n: int,
    m: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    some = row_group if ignore is None else ignore
    assert some is not None
    return (
        some.new_empty(n, dtype=torch.int32),
        some.new_empty(m, dtype=torch.int32),
        some.new_empty(n + 1, dtype=torch.int64),
        some.new_empty(0 if ignore is None else ignore.shape[0], dtype=torch.int32),
        some.new_empty(n, dtype=torch.int64),
        some.new_empty(m, dtype=torch.int64),
    )


def _check_groups(
    row_of: Tensor,
    col_of: Tensor,
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    offset: int,
) -> None:
    rows = slice(0, row_of.shape[0])
    columns = slice(offset, offset + row_of.shape[0])
    apart = row_of != col_of[columns]
    if row_valid is not None and col_valid is not None:
        apart &= row_valid[rows] & col_valid[columns]
    if bool(apart.any()):
        row = int(apart.nonzero()[0, 0])
        raise ValueError(f"row {row} and its positive, column {row + offset}, differ in groups")


def _check_ignore(ignore: Tensor, n: int, m: int, offset: int) -> None:
    row, col = ignore.unbind(1)
    outside = (row < 0) | (row >= n) | (col < 0) | (col >= m)
    positive = col == row + offset
    wrong = (outside | positive).nonzero()
    if wrong.numel():
        at = int(wrong[0, 0])
        pair = tuple(ignore[at].tolist())
        reason = f"is outside [{n}, {m}]" if bool(outside[at]) else "is a positive and must be kept"
        raise ValueError(f"ignore[{at}] = {pair} {reason}")
