"""The contrastive loss with the negatives of all ranks of a process group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ume_kernels.contrastive_loss.across_ranks import GatherRows, Plan, RowLse
from ume_kernels.contrastive_loss.arguments import (
    Ignore,
    Mask,
    Reduction,
    Selection,
    check_extra,
    check_matrices,
    check_options,
    select_pairs,
)
from ume_kernels.contrastive_loss.exchange import Layout, gather, gather_header
from ume_kernels.contrastive_loss.extra import extra_lse, zero_masked_sets
from ume_kernels.contrastive_loss.op import contrastive_loss, reduce_rows
from ume_kernels.contrastive_loss.prepare import (
    Prepared,
    add_masked,
    margin_limit,
    poison,
    prepare,
    scale_tensor,
    zero_masked,
)
from ume_kernels.dispatch import Backend
from ume_kernels.scalars import plain

Tensor = torch.Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_AGREED = (
    "the number of columns", "the dtype", "normalize", "bidirectional", "local_loss", "ring",
    "whether a gradient is required", "whether groups are given", "whether there is a margin",
)  # fmt: skip


def distributed_contrastive_loss(
    q: Tensor,
    p: Tensor,
    *,
    group: Any = None,
    local_loss: bool = True,
    ring: bool = False,
    scale: float | Tensor = 50.0,
    normalize: bool = True,
    bidirectional: bool = True,
    valid: Mask | None = None,
    groups: Mask | None = None,
    extra_negatives: Tensor | None = None,
    ignore: Ignore | None = None,
    reduction: Reduction = "mean",
    backend: Backend | str | None = None,
) -> Tensor:
    """``contrastive_loss`` of every rank's own rows against the rows of all ranks.

    Row i of p is the positive of row i of q, on the same rank. The loss of a rank is the mean of
    its queries' loss over all targets and of its targets' loss over all queries, averaged over
    the pairs of that rank. Its gradient reaches the other ranks' rows; what they receive is the
    sum over the ranks' losses. That is the official training's convention (open_clip's
    ``local_loss`` and ``gather_with_grad``): data parallelism then averages over the ranks.

    Every rank of the group must call it, and call the backward, with the same options. Ranks may
    have different numbers of rows, also none. Without an initialised group, or alone in it, a
    rank computes ``contrastive_loss``. The backward cannot be differentiated again, there are no
    statistics, and ``torch.compile`` leaves it outside of its graphs. The value of ``scale`` is
    not compared between ranks.

    Args:
        q, p: ``[n, D]``, n per rank; dtypes as in ``contrastive_loss``.
        group: process group of gloo or NCCL; the default group if None.
        local_loss: False computes the whole square on every rank, as the official code does:
            the same global loss everywhere, and gradients as many times it as there are ranks.
        ring: pass blocks of columns from rank to rank, in the backward again and with their
            gradients, so that no rank ever holds more than two blocks. Otherwise the columns are
            gathered, in the background of the first tiles, and kept for the backward.
        scale, normalize, bidirectional, reduction, backend: as in ``contrastive_loss``; a
            tensor's gradient is that of the rank's own loss.
        valid, groups: of this rank's rows, one tensor ``[n]`` or a pair (queries, targets).
            Groups are the same on all ranks.
        extra_negatives: ``[H, D]`` or ``[n, H, D]`` for this rank's queries only; not without
            ``local_loss``.
        ignore: int64 ``[E, 2]`` pairs of a query of this rank and a target counted over all
            ranks, a margin, or a tuple of both. Both directions leave the pairs out.

    Returns:
        This rank's loss (0 if none of its pairs counts); ``[n]`` for ``reduction="none"``; the
        global loss, ``[M]`` for ``"none"``, without ``local_loss``.

    Raises:
        TypeError, ValueError: as ``contrastive_loss``, or the ranks do not agree; all ranks raise.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return contrastive_loss(
            q, p, scale=scale, normalize=normalize, bidirectional=bidirectional, valid=valid,
            groups=groups, extra_negatives=extra_negatives, ignore=ignore, reduction=reduction,
            backend=backend,
        )  # fmt: skip
    scale = plain(scale)
    insisted = None if backend is None else str(backend)
    error: Exception | None = None
    mine = Selection()
    try:
        mine = _check(q, p, scale, valid, groups, extra_negatives, ignore, reduction)
        if ring and not local_loss:
            raise ValueError("ring needs local_loss: the whole square needs all rows on a rank")
        if extra_negatives is not None and not local_loss:
            raise ValueError("extra_negatives need local_loss: they belong to one rank's queries")
    except (TypeError, ValueError) as caught:
        error = caught
    needs_grad = torch.is_grad_enabled() and (
        isinstance(q, Tensor) and isinstance(p, Tensor) and (q.requires_grad or p.requires_grad)
    )
    options = (normalize, bidirectional, local_loss, ring, needs_grad)
    layout, listed, masked = _agree(error, q, p, mine, options, group)
    if layout.total == 0:
        return (q.sum() + p.sum()) * 0
    with torch.autocast(q.device.type, enabled=False):
        mine, everyone = _share(mine, layout, listed, masked, q.device)
        if not local_loss:
            all_q, all_p = (GatherRows.apply(x, layout) for x in (q, p))
            return contrastive_loss(
                all_q, all_p, scale=scale, normalize=normalize, bidirectional=bidirectional,
                valid=_pair(everyone.row_valid, everyone.col_valid),
                groups=_pair(everyone.row_group, everyone.col_group),
                ignore=(everyone.ignore, mine.margin), reduction=reduction, backend=backend,
            )  # fmt: skip
        q, p = zero_masked(q, mine.row_valid), zero_masked(p, mine.col_valid)
        factor = scale_tensor(scale, q)
        try:
            prepared = _prepare_sides(mine, everyone, layout, bidirectional)
        except ValueError as caught:
            error = caught
        if mine.ignore is not None or mine.row_group is not None:  # values were checked
            _raise_together(error, _gather_flags(error, group, q.device))
        row_limit = None
        if mine.margin is not None:
            # for both directions: the positives are local
            row_limit = margin_limit(q, p, factor, normalize, 0, mine.margin)
        sides = tuple(replace(side.pairs, row_limit=row_limit) for side in prepared)
        plan = Plan(layout, sides, ring, normalize, insisted)
        pos, *sums = RowLse.apply(q, p, factor, plan)
        anchor = None
        if mine.row_valid is not None and mine.col_valid is not None:
            anchor = mine.row_valid & mine.col_valid
            pos = torch.where(anchor, pos, 0)
            sums = [torch.where(anchor, lse, 0) for lse in sums]
        sums = [add_masked(lse, side.row_masked) for lse, side in zip(sums, prepared, strict=True)]
        extra_negatives = zero_masked_sets(extra_negatives, mine.row_valid)
        if extra_negatives is not None and q.shape[0]:
            extra = extra_lse(q, extra_negatives, factor, row_limit, normalize, False, insisted)
            sums[0] = torch.logaddexp(sums[0], extra.lse)
        loss = torch.stack([lse - pos for lse in sums]).mean(0)
        if mine.margin is not None and q.shape[0]:
            loss = loss + poison(q, p, extra_negatives)
        if anchor is not None:
            loss = torch.where(anchor, loss, 0)
        if reduction == "mean" and q.shape[0] == 0:
            return loss.sum()
        return reduce_rows(loss, anchor, reduction)


def _check(
    q: Tensor,
    p: Tensor,
    scale: float | Tensor,
    valid: Mask | None,
    groups: Mask | None,
    extra: Tensor | None,
    ignore: Ignore | None,
    reduction: str,
) -> Selection:
    check_matrices(q, p)
    if q.shape != p.shape:
        raise ValueError(f"q is {tuple(q.shape)} and p {tuple(p.shape)}: rows are pairs here")
    check_options(scale, reduction)
    if extra is not None:
        check_extra(extra, q)
    found = select_pairs(valid, groups, ignore, q.shape[0], p.shape[0], 0, q.device)
    if found.ignore is not None and found.ignore.shape[0]:
        row = found.ignore[:, 0]
        if bool(((row < 0) | (row >= q.shape[0])).any()):
            raise ValueError(f"ignore names rows outside [0, {q.shape[0]}), this rank's queries")
    return found


def _agree(
    error: Exception | None,
    q: Tensor,
    p: Tensor,
    mine: Selection,
    options: tuple[bool, ...],
    group: Any,
) -> tuple[Layout, tuple[int, ...], bool]:
    """Every rank's sizes, ignored pairs per rank and whether any has masks; or raises on all."""
    tensors = [t for t in (q, p) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    header = [1]
    if error is None:
        header = [
            0, q.shape[0], 0 if mine.ignore is None else mine.ignore.shape[0],
            mine.row_valid is not None, q.shape[1], _DTYPES.index(q.dtype), *options,
            mine.row_group is not None, mine.margin is not None,
        ]  # fmt: skip
    header += [0] * (4 + len(_AGREED) - len(header))
    found = gather_header([int(v) for v in header], group, device)
    _raise_together(error, [row[0] for row in found])
    rank = dist.get_rank(group)
    for at, what in enumerate(_AGREED, 4):
        other = next((r for r, row in enumerate(found) if row[at] != found[0][at]), None)
        if other is not None:
            raise ValueError(f"the ranks must agree: {what} differs between rank 0 and {other}")
    layout = Layout(group, rank, tuple(row[1] for row in found))
    return layout, tuple(row[2] for row in found), any(row[3] for row in found)


def _gather_flags(error: Exception | None, group: Any, device: torch.device) -> list[int]:
    return [row[0] for row in gather_header([error is not None], group, device)]


def _raise_together(error: Exception | None, failed: list[int]) -> None:
    # A rank that raised alone would leave the others waiting for it.
    if error is not None:
        raise error
    ranks = [rank for rank, fails in enumerate(failed) if fails]
    if ranks:
        raise ValueError(f"the arguments of rank {ranks[0]} do not fit; its error tells why")


def _share(
    mine: Selection, layout: Layout, listed: tuple[int, ...], masked: bool, device: torch.device
) -> tuple[Selection, Selection]:
    """`mine`, complete if another rank has masks, and that of all ranks in global numbers."""
    n, group = layout.sizes[layout.rank], layout.group
    everyone = Selection(margin=mine.margin)
    if masked:
        if mine.row_valid is None or mine.col_valid is None:
            every = torch.ones(n, dtype=torch.bool, device=device)
            mine = replace(mine, row_valid=every, col_valid=every)
        rows, columns = _gather_pair(mine.row_valid, mine.col_valid, torch.uint8, layout)
        everyone = replace(everyone, row_valid=rows.bool(), col_valid=columns.bool())
    if mine.row_group is not None:
        rows, columns = _gather_pair(mine.row_group, mine.col_group, torch.int64, layout)
        everyone = replace(everyone, row_group=rows, col_group=columns)
    if any(listed):
        local = mine.ignore
        if local is None:
            local = torch.empty(0, 2, dtype=torch.int64, device=device)
        offsets = torch.tensor([layout.start, 0], device=device)
        everyone = replace(everyone, ignore=gather(local + offsets, listed, group))
        mine = replace(mine, ignore=local)
    else:  # an empty list here and none there: what follows must be the same on all ranks
        mine = replace(mine, ignore=None)
    return mine, everyone


def _gather_pair(
    rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype, layout: Layout
) -> tuple[Tensor, Tensor]:
    assert rows is not None
    assert columns is not None
    both = torch.stack([rows.to(dtype), columns.to(dtype)], dim=1)
    found = gather(both, layout.sizes, layout.group)
    return found[:, 0].contiguous(), found[:, 1].contiguous()


def _pair(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if rows is None or columns is None else (rows, columns)


def _prepare_sides(
    mine: Selection, everyone: Selection, layout: Layout, bidirectional: bool
) -> list[Prepared]:
    """Conditions of the local queries against all targets, and of the reverse."""
    n, start = layout.sizes[layout.rank], layout.start
    sides = [
        Selection(
            mine.row_valid, everyone.col_valid, mine.row_group, everyone.col_group, mine.ignore
        )
    ]
    if bidirectional:
        ignore = everyone.ignore
        if ignore is not None:
            row, col = ignore.unbind(1)
            here = (col >= start) & (col < layout.stop)
            ignore = torch.stack([col[here] - start, row[here]], dim=1)
        sides.append(
            Selection(
                mine.col_valid, everyone.row_valid, mine.col_group, everyone.row_group, ignore
            )
        )
    return [prepare(side, n, layout.total, start) for side in sides]
