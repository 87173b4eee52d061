"""Text and pictures to model inputs, without torchvision."""

import inspect
import json
import math
import os

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from src.utils import print_master

QWEN2_VL = "qwen2_vl"
QWEN2_5_VL = "qwen2_5_vl"
COLPALI = "colpali"
MODEL2BACKBONE = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "colpali": COLPALI}
VLM_IMAGE_TOKENS = {QWEN2_VL: "<|image_pad|>", QWEN2_5_VL: "<|image_pad|>"}
VLM_VIDEO_TOKENS = {QWEN2_VL: "<|video_pad|>", QWEN2_5_VL: "<|video_pad|>"}

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PATCH, MERGE, FRAMES = 14, 2, 2


def image_to_patches(image, min_pixels, max_pixels):
    """Patches ``[h·w, 3·2·14·14]`` in the order of merge blocks, and the grid (1, h, w)."""
    side = PATCH * MERGE
    width, height = image.size
    size = [max(side, round(edge / side) * side) for edge in (width, height)]
    pixels = size[0] * size[1]
    if pixels > max_pixels or pixels < min_pixels:
        bound = max_pixels if pixels > max_pixels else min_pixels
        scale = math.sqrt(bound / (width * height))
        turn = math.floor if pixels > max_pixels else math.ceil
        size = [max(side, turn(edge * scale / side) * side) for edge in (width, height)]
    array = np.asarray(image.convert("RGB").resize(size, 3), dtype=np.float32) / 255
    array = ((array - MEAN) / STD).transpose(2, 0, 1)
    rows, columns = size[1] // PATCH, size[0] // PATCH
    blocks = np.broadcast_to(array, (FRAMES, *array.shape)).reshape(
        FRAMES, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH
    )
    blocks = blocks.transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return np.ascontiguousarray(blocks.reshape(rows * columns, -1)), (1, rows, columns)


class Processor:
    """What the script uses of a ``Qwen2VLProcessor``."""

    def __init__(self, tokenizer, chat_template, min_pixels, max_pixels):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
        )

    def __call__(self, text, images=None, videos=None, padding=True, return_tensors="pt"):
        patches, grids = [], []
        for image in images or ():
            found, grid = image_to_patches(image, self.min_pixels, self.max_pixels)
            patches.append(found)
            grids.append(grid)
        counts = iter(h * w // MERGE**2 for _, h, w in grids)
        pad = VLM_IMAGE_TOKENS[QWEN2_VL]
        expanded = []
        for one in text:
            head, *parts = one.split(pad)
            expanded.append(head + "".join(pad * next(counts) + part for part in parts))
        batch = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if patches:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            inputs["image_grid_thw"] = torch.tensor(grids)
        if (
            "mm_token_type_ids"
            in inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters
        ):  # transformers 5
            image_id = self.tokenizer.convert_tokens_to_ids(pad)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        return inputs


def load_processor(model_args, data_args=None):
    path = model_args.checkpoint_path or model_args.model_name
    print_master(f"Loading processor from: {path}")
    template = None
    if os.path.exists(os.path.join(path, "chat_template.json")):
        with open(os.path.join(path, "chat_template.json"), encoding="utf-8") as f:
            template = json.load(f)["chat_template"]
    return Processor(
        AutoTokenizer.from_pretrained(path),
        template,
        data_args.resize_min_pixels,
        data_args.resize_max_pixels,
    )


def get_backbone_name(hf_config, model_type=None):
    return MODEL2BACKBONE[model_type or hf_config.model_type]
