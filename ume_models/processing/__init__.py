"""Prompts and media to packed tensors, exactly as the official evaluation makes them."""

from __future__ import annotations

from ume_models.processing.config import ImageConfig
from ume_models.processing.items import Item, MediaSource, parse_item
from ume_models.processing.jsonl import read_items
from ume_models.processing.pool import prefetch
from ume_models.processing.processor import PlannedItem, PreparedItem, Processor
from ume_models.processing.prompt import GENERATION_PROMPT, PREFIX, SUFFIX

__all__ = [
    "GENERATION_PROMPT",
    "PREFIX",
    "SUFFIX",
    "ImageConfig",
    "Item",
    "MediaSource",
    "PlannedItem",
    "PreparedItem",
    "Processor",
    "parse_item",
    "prefetch",
    "read_items",
]
