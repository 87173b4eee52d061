"""The contrastive loss by its definition: the whole matrix, plain autograd, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ume_kernels.contrastive_loss.arguments import (
    Ignore,
    Mask,
    Reduction,
    Selection,
    check_extra,
    check_matrices,
    check_options,
    check_sizes,
    select_pairs,
)
from ume_kernels.contrastive_loss.pairs import accumulation_dtype
from ume_kernels.contrastive_loss.prepare import MASKED
from ume_kernels.contrastive_loss.stats import ContrastiveStats, contrastive_stats

Tensor = torch.Tensor


def contrastive_loss_reference(
    q: Tensor,
    p: Tensor,
    *,
    scale: float | Tensor = 50.0,
    normalize: bool = True,
    bidirectional: bool = True,
    valid: Mask | None = None,
    row_offset: int = 0,
    groups: Mask | None = None,
    extra_negatives: Tensor | None = None,
    ignore: Ignore | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """What ``contrastive_loss`` computes, for its arguments, with the matrix ``[N, M]`` stored.

    Cross-entropy of the scores' rows, and of its columns' transpose, with the positives as labels
    (PLUME, ``_distributed_bidirectional_contrastive_loss``). Differentiable any number of times.
    """
    check_matrices(q, p)
    n, m = q.shape[0], p.shape[0]
    check_sizes(n, m, row_offset)
    check_options(scale, reduction)
    selection = select_pairs(valid, groups, ignore, n, m, row_offset, q.device)
    if extra_negatives is not None:
        check_extra(extra_negatives, q)
    dtype = accumulation_dtype(q.dtype)
    rows, columns = torch.arange(n, device=q.device), torch.arange(m, device=q.device)
    label = rows + row_offset
    row_valid, col_valid = selection.row_valid, selection.col_valid
    if row_valid is None or col_valid is None:
        row_valid = torch.ones(n, dtype=torch.bool, device=q.device)
        col_valid = torch.ones(m, dtype=torch.bool, device=q.device)
    anchor = row_valid & col_valid[label]

    a = torch.where(row_valid[:, None], q.to(dtype), 0)
    b = torch.where(col_valid[:, None], p.to(dtype), 0)
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    scores = scale * (a @ b.T)
    positive = scores[rows, label]
    is_positive = label[:, None] == columns

    exists = _exists(selection, n, m, is_positive)
    in_rows = scores.masked_fill(~col_valid, MASKED)
    in_columns = scores.masked_fill(~row_valid[:, None], MASKED)
    extra = None
    if extra_negatives is not None:
        sets = extra_negatives.to(dtype)
        if sets.ndim == 3:
            sets = torch.where(row_valid[:, None, None], sets, 0)
        if normalize:
            sets = F.normalize(sets, dim=-1)
        extra = scale * torch.einsum("nd,hd->nh" if sets.ndim == 2 else "nd,nhd->nh", a, sets)
    drop_rows, drop_columns = ~exists, ~exists
    if selection.margin is not None:
        limit = (positive - selection.margin * scale).detach()
        drop_rows = drop_rows | ((in_rows > limit[:, None]) & ~is_positive & col_valid)
        by_column = limit.new_full((m,), torch.inf)
        by_column[label] = limit
        above = (in_columns > by_column) & row_valid[:, None]
        drop_columns = drop_columns | (above & ~is_positive)
        if extra is not None:
            extra = extra.masked_fill(extra > limit[:, None], -torch.inf)
    in_rows = in_rows.masked_fill(drop_rows, -torch.inf)
    in_columns = in_columns.masked_fill(drop_columns, -torch.inf)
    if extra is not None:
        in_rows = torch.cat([in_rows, extra], dim=1)

    # Rows that do not count may have no pair at all; their losses are not used.
    lse = in_rows[anchor].logsumexp(1)
    loss = lse - positive[anchor]
    if bidirectional:
        loss = (loss + in_columns.T[label[anchor]].logsumexp(1) - positive[anchor]) / 2
    connected = (q.sum() * 0 + p.sum() * 0).nan_to_num().to(dtype)
    every = torch.zeros(n, dtype=dtype, device=q.device).masked_scatter(anchor, loss)
    if reduction == "none":
        result = every + connected
    elif reduction == "sum":
        result = every.sum() + connected
    else:
        result = every.sum() / anchor.sum().clamp_min(1) + connected
    if not return_stats:
        return result
    with torch.no_grad():
        rivals = in_rows.clone()
        rivals[:, :m] = rivals[:, :m].masked_fill(is_positive | ~col_valid, -torch.inf)
        rivals = rivals.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        hardest, index = rivals.max(1).values, rivals.argmax(1)
        index = index.masked_fill(hardest == -torch.inf, -1)
        zeros = torch.zeros(n, dtype=dtype, device=q.device)
        stats = contrastive_stats(
            every,
            zeros.masked_scatter(anchor, lse),
            torch.where(anchor, positive, 0),
            hardest,
            index,
            anchor,
            row_offset,
        )
    return result, stats


def _exists(selection: Selection, n: int, m: int, is_positive: Tensor) -> Tensor:
    """bool ``[N, M]``: the pairs that groups and the list leave."""
    exists = torch.ones(n, m, dtype=torch.bool, device=is_positive.device)
    if selection.row_group is not None and selection.col_group is not None:
        exists &= selection.row_group[:, None] == selection.col_group
    if selection.ignore is not None:
        row, col = selection.ignore.unbind(1)
        if bool(is_positive[row, col].any()):
            raise ValueError("a positive must not be ignored")
        exists[row, col] = False
    return exists
