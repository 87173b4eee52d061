"""Items to one padded batch in processor layout, for libraries that batch by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.embedders.rows import MEDIA_INPUTS
from ume_models.errors import ItemError
from ume_models.processing import PlannedItem, PreparedItem, prefetch
from ume_models.processing.items import Item

_WORKERS = 2


def prompt_limit(model: PlumeForEmbedding) -> int:
    """Longest prompt in tokens: the model's positions less prefix, latent steps and suffix."""
    follow = len(model.prefix_ids) + model.latent_steps + len(model.suffix_ids)
    return model.config.max_position_embeddings - follow


def prepare_batch(
    model: PlumeForEmbedding, items: Sequence[Item], max_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """Arguments of ``PlumeForEmbedding.embed``: rows padded on the left, visuals one after another.

    Args:
        model: gives processor and tokenizer.
        items: checked items.
        max_tokens: longer prompts raise; nothing is ever cut. Default: what the model holds.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, N]``; of images and videos, where there are
        any, patches float32 ``[P, C·T·p·p]`` and grids int64 ``[n, 3]``. All on the CPU.

    Raises:
        ItemError: an item is too long or its media do not load. ``index`` is that in ``items``.
    """
    limit = prompt_limit(model) if max_tokens is None else max_tokens
    plans = model.processor.plan(items)
    for plan in plans:
        if plan.num_tokens > limit:
            raise ItemError(
                f"the prompt has {plan.num_tokens} tokens with template and visual tokens, more "
                f"than the limit of {limit}; shorten the text, send fewer frames or lower "
                "max_pixels (nothing is truncated)",
                plan.index,
                plan.id,
            )

    def load(plan: PlannedItem) -> PreparedItem:
        return model.processor.load(plan)

    prepared = list(prefetch(load, plans, _WORKERS if len(plans) > 1 else 0, 2 * _WORKERS))
    return pad(prepared, model.tokenizer)


def pad(items: Sequence[PreparedItem], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Prepared items as one batch, see :func:`prepare_batch`."""
    filler = tokenizer.pad_token_id
    longest = max(item.input_ids.numel() for item in items)
    # The mask decides what counts, so any id will do where the tokenizer names none.
    ids = torch.full((len(items), longest), 0 if filler is None else int(filler))
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
