from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ume_models.errors import CheckpointError
from ume_models.processing import ImageConfig


def write(directory: Path, data: Any, name: str = "preprocessor_config.json") -> Path:
    (directory / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def test_recorded_checkpoint(recorded_dir: Path) -> None:
    config = ImageConfig.from_checkpoint(recorded_dir / "checkpoint")
    assert (config.patch_size, config.merge_size, config.temporal_patch_size) == (14, 2, 2)
    assert config.image_std == (0.26862954, 0.26130258, 0.27577711)
    assert config.rescale_factor == 1 / 255
    assert (config.min_pixels, config.max_pixels) == (784, 50176)
    assert (config.fetch_min_pixels, config.fetch_max_pixels) == (3136, 12845056)
    assert (config.factor, config.patch_dim) == (28, 1176)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {},
    ],
)
def test_official_limits_override_wider_ones_in_both_layouts(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    config = ImageConfig.from_checkpoint(write(tmp_path, limits))
    assert (config.min_pixels, config.max_pixels) == (784, 2359296)


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 50176}, {"size": {"shortest_edge": 784, "longest_edge": 50176}}]
)
def test_smaller_maximum_is_honoured(tmp_path: Path, limits: dict[str, Any]) -> None:
    assert ImageConfig.from_checkpoint(write(tmp_path, limits)).max_pixels == 50176


def test_explicit_limits_win(tmp_path: Path) -> None:
    config = ImageConfig.from_checkpoint(write(tmp_path, {"max_pixels": 50176}), 3136, 100352)
    assert (config.min_pixels, config.max_pixels) == (3136, 100352)


def test_image_part_of_the_transformers_5_file(tmp_path: Path) -> None:
    write(tmp_path, {"image_processor": {"patch_size": 16}}, "processor_config.json")
    assert ImageConfig.from_checkpoint(tmp_path).patch_size == 16


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, {"processor_class": "Qwen2VLProcessor"}, "processor_config.json")
    with pytest.raises(CheckpointError, match=r"no preprocessor_config.json.*copy it from"):
        ImageConfig.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([], "expected a JSON object"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "bicubic"),
        ({"patch_size": "x"}, "invalid literal"),
        ({"image_mean": [0.5]}, "three values"),
        ({"max_pixels": 500}, "hold one token"),
    ],
)
def test_unusable_file(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        ImageConfig.from_checkpoint(write(tmp_path, data))
    assert "preprocessor_config.json" in str(error.value)
