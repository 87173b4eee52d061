"""Stand-in for the names of backbones and for the processor: ids and patches from a seed."""

import numpy as np
import torch

from src.model.vlm_backbone.qwen2_vl import Qwen2VLForConditionalGeneration
from src.utils.basic_utils import print_master

QWEN2_VL = "qwen2_vl"
QWEN2_5_VL = "qwen2_5_vl"
GME = "gme"
LamRA = "lamra"
COLPALI = "colpali"
LLAVA_NEXT = "llava_next"
INTERNVIDEO2 = "internvideo2"
backbone2model = {QWEN2_VL: Qwen2VLForConditionalGeneration}
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, PAD_TOKEN_ID = 727, 728, 720


class Qwen2VLProcessor:
    """Words become ids by their bytes; an image is a pair (rows, columns) of patches."""

    padding_side = "left"

    def ids(self, text):
        return [3 + sum(word.encode()) % 600 for word in text.split()] or [3]

    def patches(self, frames, height, width, seed):
        random = np.random.default_rng(seed)
        pixels = random.standard_normal((frames * height * width, 3 * 2 * 14 * 14))
        return pixels.astype(np.float32), np.array([[frames, height, width]])


def load_processor(model_args, data_args=None):
    print_master("Loading processor")
    return Qwen2VLProcessor()


def get_backbone_name(hf_config, model_type=None):
    return model_type or hf_config.model_type


def Qwen2_VL_process_fn(model_inputs, processor, max_length=None):
    texts, visuals = model_inputs["text"], model_inputs["images"]
    keys = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    inputs = {key: [] for key in keys}
    all_ids = []
    for number, (text, visual) in enumerate(zip(texts, visuals, strict=True)):
        ids, found = processor.ids(text), dict.fromkeys(keys)
        if visual is not None:
            frames, height, width = visual
            pixels, grid = processor.patches(frames, height, width, seed=number + len(text))
            token, at = (IMAGE_TOKEN_ID, 0) if frames == 1 else (VIDEO_TOKEN_ID, 2)
            found[keys[at]], found[keys[at + 1]] = pixels, grid
            ids = [token] * (frames * height * width // 4) + ids
        all_ids.append(ids)
        for key in keys:
            inputs[key].append(found[key])
    longest = max(map(len, all_ids))
    rows, masks = [], []
    for ids in all_ids:
        padding, zeros = [PAD_TOKEN_ID] * (longest - len(ids)), [0] * (longest - len(ids))
        left = processor.padding_side == "left"
        rows.append(padding + ids if left else ids + padding)
        masks.append(zeros + [1] * len(ids) if left else [1] * len(ids) + zeros)
    head = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    return {**head, "texts": texts, "images": visuals, **inputs}


process_vlm_inputs_fns = {QWEN2_VL: Qwen2_VL_process_fn}
