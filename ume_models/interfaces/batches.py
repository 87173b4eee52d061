"""Items to one padded batch in processor layout, for libraries that batch by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_models.embedders.rows import MEDIA_INPUTS
from ume_models.errors import ErrorKind, ItemError
from ume_models.processing import Item, PreparedItem, Processor, prefetch

_WORKERS = 2


def prepare_batch(
    processor: Processor, items: Sequence[Item], limit: int
) -> dict[str, torch.Tensor]:
    """Arguments of ``Embedder.embed``: rows padded on the left, visuals one after another.

    Args:
        processor: the model's.
        items: checked items.
        limit: longer prompts raise; nothing is ever cut.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, N]``; of images and videos, where there are
        any, patches float32 ``[P, C·T·p·p]`` and grids int64 ``[n, 3]``. All on the CPU.

    Raises:
        ItemError: an item is too long or its media do not load. ``index`` is that in ``items``.
    """
    plans = processor.plan(items)
    for plan in plans:
        if plan.num_tokens > limit:
            raise ItemError(
                f"the prompt has {plan.num_tokens} tokens with template and visual tokens, more "
                f"than the limit of {limit}; shorten the text, send fewer frames or lower "
                "max_pixels (nothing is truncated)",
                plan.index,
                plan.id,
                kind=ErrorKind.TOO_LONG,
            )
    workers = _WORKERS if len(plans) > 1 else 0
    prepared = list(prefetch(processor.load, plans, workers, 2 * _WORKERS))
    return _pad(prepared, processor.tokenizer.pad_token_id)


def _pad(items: Sequence[PreparedItem], filler: int | None) -> dict[str, torch.Tensor]:
    longest = max(item.input_ids.numel() for item in items)
    # The mask decides what counts, so any id will do where the tokenizer names none.
    ids = torch.full((len(items), longest), filler or 0)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, longest - item.input_ids.numel() :] = item.input_ids
        mask[row, longest - item.input_ids.numel() :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in MEDIA_INPUTS:
        parts = [getattr(item, name) for item in items]
        parts = [part for part in parts if part is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
