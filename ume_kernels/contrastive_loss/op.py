"""``contrastive_loss``: the loss of the models, composed around one differentiable tile pass."""

from __future__ import annotations

from typing import Literal, overload

import torch

from ume_kernels.contrastive_loss.arguments import (
    Ignore,
    Mask,
    Reduction,
    check_extra,
    check_matrices,
    check_no_tangent,
    check_options,
    check_sizes,
    select_pairs,
)
from ume_kernels.contrastive_loss.extra import extra_lse, zero_masked_sets
from ume_kernels.contrastive_loss.lse import contrastive_lse
from ume_kernels.contrastive_loss.prepare import (
    add_masked,
    poison,
    prepare,
    scale_tensor,
    with_margin,
    zero_masked,
)
from ume_kernels.contrastive_loss.stats import ContrastiveStats, contrastive_stats
from ume_kernels.dispatch import Backend
from ume_kernels.scalars import plain

Tensor = torch.Tensor


@overload
def contrastive_loss(
    q: Tensor,
    p: Tensor,
    *,
    scale: float | Tensor = ...,
    normalize: bool = ...,
    bidirectional: bool = ...,
    valid: Mask | None = ...,
    row_offset: int = ...,
    groups: Mask | None = ...,
    extra_negatives: Tensor | None = ...,
    ignore: Ignore | None = ...,
    reduction: Reduction = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | str | None = ...,
) -> Tensor: ...


@overload
def contrastive_loss(
    q: Tensor,
    p: Tensor,
    *,
    scale: float | Tensor = ...,
    normalize: bool = ...,
    bidirectional: bool = ...,
    valid: Mask | None = ...,
    row_offset: int = ...,
    groups: Mask | None = ...,
    extra_negatives: Tensor | None = ...,
    ignore: Ignore | None = ...,
    reduction: Reduction = ...,
    return_stats: Literal[True],
    backend: Backend | str | None = ...,
) -> tuple[Tensor, ContrastiveStats]: ...


def contrastive_loss(
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
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """InfoNCE of N queries and M targets, in memory O((N + M) D).

    With ``s_ij = scale q_i.p_j`` of the normalised rows and the positive of row i in column
    ``c = i + row_offset``, row i has the loss ``log sum_j exp s_ij - s_ic``; bidirectional, the
    mean of that and ``log sum_k exp s_kc - s_ic``. The defaults are the loss of PLUME's training
    (``_distributed_bidirectional_contrastive_loss`` on one device).

    Accumulates in float32 (float64 for float64), the same bits for the same inputs and backend
    (PyTorch's own products also depend on its number of threads). The backward computes the scores
    a second time and cannot be differentiated again; there is no forward-mode derivative.

    Args:
        q: ``[N, D]`` float32, float16, bfloat16 or float64.
        p: ``[M, D]`` like q, ``M >= N + row_offset``.
        scale: positive; as a 0-d tensor, whose value is not checked (that would wait for a GPU),
            it may require a gradient: ``log_scale.exp()``.
        normalize: divide the rows by their norms (at least 1e-12).
        bidirectional: also rank the queries for each target that is a positive.
        valid: bool ``[M]`` for the columns, where a row is as valid as its positive, or a pair
            ``([N], [M])`` for rows and columns. A row counts if it and its positive are valid.
            Rows and columns that are not valid get no gradient, whatever they hold, and stay in
            the other direction's sums with the logit -1e4, as in the official code.
        row_offset: column of the first row's positive.
        groups: integers, ``[M]`` or a pair ``([N], [M])`` in the same way. Pairs of
            different groups do not exist (not even at -1e4).
        extra_negatives: ``[H, D]`` for every query or ``[N, H, D]``, one set each; of all groups.
            They join the sums over the targets, not those over the queries.
        ignore: int64 ``[E, 2]`` of pairs (row, column) that do not exist; or a float margin that
            drops what scores above positive - margin before scaling (by more than rounding), in
            each direction against its own positive and without a gradient through the threshold,
            extra negatives too; or a tuple of both.
        reduction: ``"mean"`` over the rows that count (0 if none does, with zero gradients),
            ``"sum"``, or ``"none"``: ``[N]``, 0 where a row does not count.
        return_stats: also return `ContrastiveStats`, from the same pass.
        backend: insist on one; default as ``ume_kernels.explain`` tells.

    Returns:
        The loss in the accumulation dtype, and the stats where asked for. NaN or infinity in a
        valid row shows as NaN or infinity in the loss, the gradient or both; no index is reported
        for such a row. A row whose norm overflows float32 is divided by infinity, as
        ``torch.nn.functional.normalize`` does.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Values of ``groups``
            and pairs of ``ignore`` are checked too (a positive must not be ignored or in another
            group than its row), which on a GPU waits for it.
        BackendError: ``backend`` or ``UME_BACKEND`` asks for one that cannot run.
    """
    scale, row_offset = plain(scale), plain(row_offset)
    check_matrices(q, p)
    check_no_tangent(q, p, scale, extra_negatives)
    n, m = q.shape[0], p.shape[0]
    check_sizes(n, m, row_offset)
    check_options(scale, reduction)
    selection = select_pairs(valid, groups, ignore, n, m, row_offset, q.device)
    if extra_negatives is not None:
        check_extra(extra_negatives, q)
    insisted = None if backend is None else str(backend)
    with torch.autocast(q.device.type, enabled=False):
        anchor = None
        if selection.row_valid is not None and selection.col_valid is not None:
            anchor = selection.row_valid & selection.col_valid[row_offset : row_offset + n]
        q, p = zero_masked(q, selection.row_valid), zero_masked(p, selection.col_valid)
        factor = scale_tensor(scale, q)
        prepared = prepare(selection, n, m, row_offset)
        extra_negatives = zero_masked_sets(extra_negatives, selection.row_valid)
        if selection.margin is not None:
            prepared = with_margin(prepared, q, p, factor, normalize, selection.margin)
        pairs = prepared.pairs
        lse, col_lse, pos, hard, index = contrastive_lse(
            q, p, factor, pairs,
            normalize=normalize, columns=bidirectional, hardest=return_stats, backend=insisted,
        )  # fmt: skip
        if anchor is not None:
            # A row without any pair has -inf here, whose derivatives are NaN further on.
            lse, pos = torch.where(anchor, lse, 0), torch.where(anchor, pos, 0)
        lse = add_masked(lse, prepared.row_masked)
        if extra_negatives is not None:
            extra = extra_lse(
                q, extra_negatives, factor, pairs.row_limit, normalize, return_stats, insisted
            )
            lse = torch.logaddexp(lse, extra.lse)
            if return_stats:
                index = torch.where(extra.hard > hard, extra.column + m, index)
                hard = torch.maximum(hard, extra.hard)
        loss = lse - pos
        if bidirectional:
            back = col_lse[row_offset : row_offset + n]
            if anchor is not None:
                back = torch.where(anchor, back, 0)
            if prepared.col_masked is not None:
                masked = prepared.col_masked
                at = masked if masked.ndim == 0 else masked[row_offset : row_offset + n]
                back = add_masked(back, at)
            loss = (loss + (back - pos)) / 2
        if selection.margin is not None:
            loss = loss + poison(q, p, extra_negatives)
        if anchor is not None:
            loss = torch.where(anchor, loss, 0)
        result = reduce_rows(loss, anchor, reduction)
    if not return_stats:
        return result
    if anchor is not None:
        lse = torch.where(anchor, lse, 0)
    return result, contrastive_stats(loss, lse, pos, hard, index, anchor, row_offset)


def reduce_rows(loss: Tensor, anchor: Tensor | None, reduction: str) -> Tensor:
    """``loss [N]``, zero where a row does not count, to what the caller asked for."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    count = loss.shape[0] if anchor is None else anchor.sum().clamp_min(1)
    return total / count
