"""PLUME's pixels, held to what the official collator feeds under two versions of its library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ume_models.embedders.plume_prompt import PROFILES
from ume_models.errors import ItemError


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "version"), [("official", "0.0.14"), ("official-qwen-vl-utils-0.0.11", "0.0.11")]
)
def test_inputs_are_the_recorded_ones(
    recorded_inputs: Any, family_processor: Any, name: str, version: str
) -> None:
    recording = recorded_inputs(f"processing_official/qwen_vl_utils_{version}")
    # the collator keeps the first of several pictures
    processor = family_processor(PROFILES[name], multi_image="first")
    assert len(recording.cases) == 15
    for key in recording.cases:
        recording.check(processor, key, {"text": recording.text(key)})


def test_the_older_rules_differ_in_transparent_pictures_alone(
    recorded_inputs: Any, family_processor: Any
) -> None:
    recording = recorded_inputs("processing_official/qwen_vl_utils_0.0.11")
    processor = family_processor(PROFILES["before-profiles"], multi_image="first")
    for key in recording.cases:
        if key == "image_rgba":
            with pytest.raises(AssertionError):
                recording.check(processor, key, {"text": recording.text(key)})
        else:
            recording.check(processor, key, {"text": recording.text(key)})


@pytest.mark.parametrize(
    ("frames", "size", "grid"),
    [
        # 728 x 1288 after the first resize; the budget leaves 576 tokens a frame, then 134.4
        (400, (1280, 720), [200, 36, 62]),
        (2001, (1280, 720), [1001, 16, 30]),
        # never less than 128 tokens
        (1, (56, 56), [1, 24, 24]),
    ],
)
def test_clips_share_a_budget(
    family_processor: Any, frames: int, size: tuple[int, int], grid: list[int]
) -> None:
    processor = family_processor(PROFILES["official"])
    [plan] = processor.plan([{"video": [Image.new("RGB", size)] * frames}])
    assert [*plan.visuals[0].grid] == grid


def test_a_smaller_maximum_resizes_frames_once_more(family_processor: Any) -> None:
    rng = np.random.default_rng(0)
    frame = Image.fromarray(rng.integers(0, 256, (336, 616, 3), dtype=np.uint8))
    processor = family_processor(PROFILES["official"], max_pixels=50176)
    older = family_processor(PROFILES["before-profiles"], max_pixels=50176)
    # 336 x 616 is a multiple of two tokens and within the limits of clips: one resize is left
    item = {"video": [frame]}
    got, want = (p.load(p.plan([item])[0]).pixel_values_videos for p in (processor, older))
    assert torch.equal(got, want)


def test_transparent_frames_are_laid_on_white_too(family_processor: Any) -> None:
    clear, white = Image.new("RGBA", (56, 56)), Image.new("RGB", (56, 56), "white")
    processor = family_processor(PROFILES["official"])
    made = [processor.load(p) for p in processor.plan([{"video": [f]} for f in (clear, white)])]
    assert torch.equal(made[0].pixel_values_videos, made[1].pixel_values_videos)


def test_frames_of_several_sizes_are_refused(family_processor: Any) -> None:
    frames = [Image.new("RGB", (112, 112)), Image.new("RGB", (224, 112))]
    with pytest.raises(ItemError, match="frame 1"):
        family_processor(PROFILES["official"]).plan([{"video": frames}])


def test_extreme_proportions(family_processor: Any) -> None:
    # 200 to 1, which becomes 28 x 5,796: more than 200 to 1
    item = {"image": Image.new("RGB", (5800, 29))}
    [plan] = family_processor(PROFILES["official"]).plan([item])
    assert plan.visuals[0].grid == (1, 108, 108)
    with pytest.raises(ItemError, match="200 times"):
        family_processor(PROFILES["before-profiles"]).plan([item])


def test_settings_from_before_profiles_are_written_as_they_were(family_processor: Any) -> None:
    described = family_processor(PROFILES["before-profiles"]).described()
    assert described == {
        "multi_image": None,
        "text_only_image": True,
        "empty": "error",
        "images": {
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": (0.48145466, 0.4578275, 0.40821073),
            "image_std": (0.26862954, 0.26130258, 0.27577711),
            "rescale_factor": 1 / 255,
            "min_pixels": 784,
            "max_pixels": 2359296,
            "fetch_min_pixels": 3136,
            "fetch_max_pixels": 12845056,
        },
    }
    official = family_processor(PROFILES["official"]).described()["images"]
    added = {"transparency": "white", "clips": "together", "extreme": "square"}
    added |= {"stored_limit": False}
    assert official == {**described["images"], **added}
