from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ume_models.processing import ImageConfig
from ume_models.processing.patches import make_patches, normalise_table

# Every test here compares with transformers' own processor, whichever version is installed.
pytestmark = pytest.mark.compat

MODES = ["L", "1", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]


def image_in_mode(mode: str, noise: Any) -> Image.Image:
    if mode == "I;16":
        rng = np.random.default_rng(0)
        return Image.fromarray(rng.integers(0, 600, (45, 70), dtype=np.uint16))
    if mode in ("HSV", "LAB", "YCbCr", "1", "I", "F", "L", "CMYK", "P", "RGBX"):
        rgb = noise(70, 45)
        return (
            Image.frombytes("LAB", (70, 45), rgb.tobytes()) if mode == "LAB" else rgb.convert(mode)
        )
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = np.random.default_rng(0).integers(0, 256, 70 * 45 * channels, dtype=np.uint8)
    return Image.frombytes(mode, (70, 45), data.tobytes())


def processed(make_processor: Any, item: dict[str, Any], **rules: Any) -> Any:
    processor = make_processor(**rules)
    return processor.load(processor.plan([item])[0])


@given(
    width=st.integers(28, 400),
    height=st.integers(28, 400),
    max_pixels=st.sampled_from([12544, 50176, 2359296]),
    seed=st.integers(0, 9),
)
def test_bit_equal_on_odd_sizes(
    make_processor: Any,
    hf_image_processor: Any,
    width: int,
    height: int,
    max_pixels: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    ours = processed(make_processor, {"image": image}, fetch_min_pixels=None, max_pixels=max_pixels)
    theirs = hf_image_processor(min_pixels=784, max_pixels=max_pixels)(
        images=[image], return_tensors="pt"
    )
    assert torch.equal(ours.image_grid_thw, theirs["image_grid_thw"])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_in_every_mode(
    make_processor: Any, hf_image_processor: Any, noise: Any, mode: str
) -> None:
    image = image_in_mode(mode, noise)
    assert image.mode == mode
    ours = processed(make_processor, {"image": image}, fetch_min_pixels=None)
    # qwen_vl_utils converts before transformers sees the image. Without it transformers 4 would
    # do the same, but transformers 5 puts transparent pixels on white.
    theirs = hf_image_processor(min_pixels=784, max_pixels=2359296)(
        images=[image.convert("RGB")], return_tensors="pt"
    )
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])


def test_bit_equal_with_the_fetch_stage(
    make_processor: Any, hf_image_processor: Any, noise: Any
) -> None:
    # 600 x 37 becomes 588 x 28 in the fetch stage (qwen_vl_utils), which then resizes with
    # Pillow's default filter; small limits make the second resize a real one as well.
    image = noise(333, 100)
    fetched = image.convert("RGB").resize((336, 112))
    ours = processed(make_processor, {"image": image}, max_pixels=10000)
    theirs = hf_image_processor(min_pixels=784, max_pixels=10000)(
        images=[fetched], return_tensors="pt"
    )
    assert ours.image_grid_thw.tolist() == theirs["image_grid_thw"].tolist() == [[1, 4, 12]]
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])


def test_every_pixel_value_in_every_channel(make_processor: Any, hf_image_processor: Any) -> None:
    ramp = np.arange(28 * 28 * 3, dtype=np.int64).reshape(28, 28, 3) // 3 % 256
    image = Image.fromarray(ramp.astype(np.uint8))
    ours = processed(make_processor, {"image": image}, fetch_min_pixels=None)
    theirs = hf_image_processor(min_pixels=784, max_pixels=2359296)(
        images=[image], return_tensors="pt"
    )
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])


def naive_patches(frames: list[np.ndarray], config: ImageConfig) -> np.ndarray:
    """The definition, patch by patch."""
    table = normalise_table(config)
    depth, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    frames = frames + [frames[-1]] * (-len(frames) % depth)
    height, width, _ = frames[0].shape
    rows = []
    for t in range(0, len(frames), depth):
        for wy in range(0, height, patch * merge):
            for wx in range(0, width, patch * merge):
                for y in range(wy, wy + patch * merge, patch):
                    for x in range(wx, wx + patch * merge, patch):
                        rows.append(
                            [
                                table[c][frames[t + d][y : y + patch, x : x + patch, c]].ravel()
                                for c in range(3)
                                for d in range(depth)
                            ]
                        )
    return np.array(rows).reshape(len(rows), -1)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
@pytest.mark.parametrize(("patch", "merge", "depth"), [(14, 2, 2), (16, 2, 3), (2, 1, 1)])
def test_patch_order(num_frames: int, patch: int, merge: int, depth: int) -> None:
    config = ImageConfig(patch_size=patch, merge_size=merge, temporal_patch_size=depth)
    rng = np.random.default_rng(0)
    side = patch * merge
    frames = [
        rng.integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8) for _ in range(num_frames)
    ]
    got, grid = make_patches(frames, config, normalise_table(config))
    assert grid == (-(-num_frames // depth), 2 * merge, 3 * merge)
    assert np.array_equal(got, naive_patches(frames, config))
