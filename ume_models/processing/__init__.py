"""Prompts and media to packed tensors, exactly as official evaluations make them."""

from __future__ import annotations

from ume_models.processing.config import ImageConfig
from ume_models.processing.items import Item, MediaSource, parse_item
from ume_models.processing.jsonl import read_items
from ume_models.processing.pool import prefetch
from ume_models.processing.processor import PlannedItem, PreparedItem, Processor
from ume_models.processing.rules import MediaRules
from ume_models.processing.template import Rendered, Template

__all__ = [
    "ImageConfig",
    "Item",
    "MediaRules",
    "MediaSource",
    "PlannedItem",
    "PreparedItem",
    "Processor",
    "Rendered",
    "Template",
    "parse_item",
    "prefetch",
    "read_items",
]
