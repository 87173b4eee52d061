from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ume_models.errors import CheckpointError, ErrorKind, OptionError
from ume_models.processing import ImageConfig, MediaRules


def write(directory: Path, data: Any, name: str = "preprocessor_config.json") -> Path:
    (directory / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def test_recorded_checkpoint(recorded_dir: Path) -> None:
    config = ImageConfig.from_checkpoint(recorded_dir / "checkpoint")
    assert (config.patch_size, config.merge_size, config.temporal_patch_size) == (14, 2, 2)
    assert config.image_std == (0.26862954, 0.26130258, 0.27577711)
    assert config.rescale_factor == 1 / 255
    assert config.stored_max_pixels == 50176
    assert (config.factor, config.patch_dim) == (28, 1176)


@pytest.mark.parametrize(
    ("limits", "stored"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056}, 12845056),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, 50176),
        ({}, None),
    ],
)
def test_limit_of_the_checkpoint_in_both_layouts(
    tmp_path: Path, limits: dict[str, Any], stored: int | None
) -> None:
    assert ImageConfig.from_checkpoint(write(tmp_path, limits)).stored_max_pixels == stored


def test_limits_that_the_caller_got_wrong_are_no_fault_of_the_file(tmp_path: Path) -> None:
    images = ImageConfig.from_checkpoint(write(tmp_path, {}))
    with pytest.raises(OptionError, match="max_pixels") as caught:
        MediaRules().for_checkpoint(images, max_pixels=10)
    assert caught.value.kind is ErrorKind.OPTION


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
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ([], "expected a JSON object"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "bicubic"),
        ({"patch_size": "x"}, "patch_size"),
        ({"patch_size": 10**30}, "patch_size"),
        ({"temporal_patch_size": -2}, "temporal_patch_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"max_pixels": 500}, "max_pixels"),
        ({"size": {"longest_edge": [1]}}, "max_pixels"),
        ({"size": 7}, "size"),
    ],
)
def test_unusable_file(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        ImageConfig.from_checkpoint(write(tmp_path, data))
    assert "preprocessor_config.json" in str(error.value)
