"""Preparing images as the official evaluation does, and as one does it well with transformers.

Officially every image is decoded and encoded anew as base64 JPEG, which is then not used where
there is a path; it is decoded again, resized by ``qwen_vl_utils`` and resized and cut into patches
by transformers' processor: one image after the other in the thread that also runs the model.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from ume_models.processing import Processor, prefetch
from ume_models.processing.resize import fetch_size

Inputs = tuple[torch.Tensor, torch.Tensor]
"""Token ids ``[n]`` without the assistant prefix, and patches ``[p, C·T·p·p]``."""


class TransformersPreprocessing:
    """transformers' image processor and tokenizer on one image at a time.

    Args:
        processor: whose tokenizer, prompts and limits of both resizes are used.
        encode_anew: the official detour through base64 JPEG.
    """

    def __init__(self, processor: Processor, encode_anew: bool) -> None:
        # torchvision's resize gives other pixels than the recorded outputs of the official code.
        name = "Qwen2VLImageProcessorPil"
        made = getattr(transformers, name, None) or transformers.Qwen2VLImageProcessor
        self.rules, self.factor = processor.rules, processor.config.factor
        self.processor = made(min_pixels=self.rules.min_pixels, max_pixels=self.rules.max_pixels)
        self.tokenizer, self.template = processor.tokenizer, processor.template
        self.encode_anew = encode_anew

    def __call__(self, item: dict[str, Any]) -> Inputs:
        """Inputs of the model for an item of one image and a text."""
        if self.encode_anew:
            as_base64(item["image"])
        rules = self.rules
        assert rules.fetch_min_pixels is not None
        with Image.open(item["image"]) as opened:
            image = opened.convert("RGB")
        height, width = fetch_size(
            image.height, image.width, self.factor, rules.fetch_min_pixels, rules.fetch_max_pixels
        )
        fetched = image.resize((width, height), Image.Resampling.BICUBIC)
        out = self.processor(images=[fetched], return_tensors="pt")
        count = int(out["image_grid_thw"].prod()) // self.processor.merge_size**2
        text = str(self.template.render(("image",), "", item["text"]))
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        return ids, out["pixel_values"]

    def run(self, items: Sequence[dict[str, Any]], workers: int) -> Iterator[Inputs]:
        """All items in order, so many threads ahead; 0 in between."""
        return prefetch(self, items, workers, 8)


def as_base64(source: str | Path | bytes) -> str:
    """The data address that the official code makes of every image."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
