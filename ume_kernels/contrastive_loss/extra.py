"""Hard negatives beside the targets: columns that only the queries are ranked against."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ume_kernels.contrastive_loss.lse import contrastive_lse
from ume_kernels.contrastive_loss.pairs import Pairs, inverse_norms

Tensor = torch.Tensor


def zero_masked_sets(extra: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """``extra [N, H, D]`` with zeros for rows that are not valid; ``[H, D]`` as it is."""
    if extra is None or valid is None or extra.ndim == 2:
        return extra
    return torch.where(valid[:, None, None], extra, 0)


class ExtraLse(NamedTuple):
    """Over the extra negatives alone: log-sum-exp ``[N]``, best score and its column from 0 on."""

    lse: Tensor
    hard: Tensor
    column: Tensor


def extra_lse(
    q: Tensor,
    extra: Tensor,
    scale: Tensor,
    row_limit: Tensor | None,
    normalize: bool,
    hardest: bool,
    backend: str | None,
) -> ExtraLse:
    """log-sum-exp ``[N]`` over the extra negatives, and the hardest of them."""
    if extra.ndim == 2:
        # No row has its positive here: the offset leads past the last column.
        pairs = Pairs(offset=extra.shape[0], row_limit=row_limit)
        out = contrastive_lse(
            q, extra, scale, pairs,
            normalize=normalize, columns=False, hardest=hardest, backend=backend,
        )  # fmt: skip
        return ExtraLse(out.row_lse, out.hard, out.hard_index)
    dtype = scale.dtype
    # Not a matrix product: under autocast its backward would round to 16 bits.
    scores = (extra.to(dtype) * q.to(dtype).unsqueeze(1)).sum(-1) * scale
    if normalize:
        scores = scores * inverse_norms(q).unsqueeze(1) * inverse_norms(extra)
    if row_limit is not None:
        scores = scores.masked_fill(~(scores <= row_limit.unsqueeze(1)), -torch.inf)
    lse = _finite_logsumexp(scores)
    with torch.no_grad():
        rivals = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        index = rivals.argmax(1)
        hard = rivals.gather(1, index.unsqueeze(1)).squeeze(1)
    return ExtraLse(lse, hard, index)


def _finite_logsumexp(scores: Tensor) -> Tensor:
    """logsumexp over the last dimension whose gradient is 0, not NaN, where all are -inf."""
    none = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(none, 0), dim=-1)
    return lse.masked_fill(none.squeeze(-1), -torch.inf)
