"""What a training loop logs about a contrastive batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class ContrastiveStats:
    """Detached by-products of a loss. A row that does not count has loss, lse and positive 0.

    Scores are scaled. Extra negatives have the indices M, M + 1, … after the columns. Negatives
    are the pairs of the loss: what groups, masks or ``ignore`` leave out is not among them, so a
    margin of 0 or more makes the accuracy 1.

    Attributes:
        loss_per_row: ``[N]``, what ``reduction="none"`` returns.
        lse: ``[N]`` log-sum-exp of the row (queries to targets).
        positive: ``[N]`` score of the positive.
        hardest: ``[N]`` best score among the row's negatives, -inf where there are none.
        hardest_index: int64 ``[N]`` its column, the lowest among equals; -1 where there is none
            and where the row's scores are not finite.
        accuracy: 0-d, share of the counting rows whose positive comes first (at equal scores the
            lower column does, as in ``argmax``); 0 if no row counts.
        count: 0-d int64, rows that count.
    """

    loss_per_row: Tensor
    lse: Tensor
    positive: Tensor
    hardest: Tensor
    hardest_index: Tensor
    accuracy: Tensor
    count: Tensor


def contrastive_stats(
    loss: Tensor,
    lse: Tensor,
    positive: Tensor,
    hardest: Tensor,
    index: Tensor,
    anchor: Tensor | None,
    offset: int,
) -> ContrastiveStats:
    """Stats of N rows of which those in `anchor` (None: all) count."""
    loss, lse, positive = loss.detach(), lse.detach(), positive.detach()
    finite = lse.isfinite() & positive.isfinite()
    if anchor is None:
        anchor = torch.ones_like(finite)
    found = finite & anchor & (index >= 0)
    index = torch.where(found, index, -1)
    hardest = torch.where(found, hardest, -torch.inf)
    own = torch.arange(offset, offset + loss.shape[0], device=loss.device)
    first = (positive > hardest) | ((positive == hardest) & (own < index))
    count = anchor.sum()
    hits = (first & finite & anchor).sum()
    accuracy = hits.to(loss.dtype) / count.clamp_min(1)
    return ContrastiveStats(loss, lse, positive, hardest, index, accuracy, count)
