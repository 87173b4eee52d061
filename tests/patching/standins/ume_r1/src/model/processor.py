"""Text and pictures to model inputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

COLPALI = "colpali"
QWEN2_VL = "qwen2_vl"
MODEL2BACKBONE = {"qwen2_vl": QWEN2_VL}


class Processor:
    """A tokenizer, and pictures of 4 by 4 patches whose pixels are drawn from a seed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], images: list[int | None]) -> dict[str, torch.Tensor]:
        vision = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
        pairs = zip(texts, images, strict=True)
        rows = [vision * (image is not None) + text for text, image in pairs]
        found = self.tokenizer(rows, return_tensors="pt", padding=True)
        batch = {key: found[key] for key in ("input_ids", "attention_mask")}
        seeds = [image for image in images if image is not None]
        if seeds:
            pixels = [
                torch.randn(16, 1176, generator=torch.Generator().manual_seed(s)) for s in seeds
            ]
            batch["pixel_values"] = torch.cat(pixels)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(seeds))
        forward = inspect.signature(Qwen2VLForConditionalGeneration.forward)
        if "mm_token_type_ids" in forward.parameters:  # transformers 5
            image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            batch["mm_token_type_ids"] = (batch["input_ids"] == image_id).int()
        return batch


def load_processor(model_args: Any, data_args: Any = None) -> Processor:
    return Processor(AutoTokenizer.from_pretrained(model_args.model_name))


def get_backbone_name(hf_config: Any, model_type: str | None = None) -> str:
    return MODEL2BACKBONE[hf_config.model_type]
