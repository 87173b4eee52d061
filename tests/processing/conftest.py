from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ume_models.embedders.plume_prompt import PlumePrompt
from ume_models.processing import ImageConfig, MediaRules, Processor

RECORDED = Path(__file__).parents[1] / "conformance" / "plume_tiny"


@pytest.fixture(scope="session")
def recorded_dir() -> Path:
    return RECORDED


@pytest.fixture(scope="session")
def recorded_cases() -> dict[str, dict[str, Any]]:
    data = json.loads((RECORDED / "cases.json").read_text())
    return {case["name"]: case for case in data["cases"]}


@pytest.fixture(scope="session")
def recorded_tensors() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "cases.safetensors")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RECORDED / "checkpoint")


@pytest.fixture(scope="session")
def make_processor(tokenizer: Any) -> Callable[..., Processor]:
    """A function that makes a processor of PLUME's prompts and of given rules."""

    def make(*, blank_image: bool = True, empty: Any = "error", **rules: Any) -> Processor:
        template = PlumePrompt(tokenizer, blank_image=blank_image)
        return Processor(tokenizer, template, ImageConfig(), MediaRules(**rules), empty=empty)

    return make


@pytest.fixture(scope="session")
def processor(make_processor: Callable[..., Processor]) -> Processor:
    return make_processor()


@pytest.fixture
def noise() -> Any:
    """A function that makes an RGB noise image of a given width and height."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng(seed)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def hf_image_processor() -> Any:
    """A function that makes transformers' own Pillow-based image processor, on any version."""
    import transformers

    def make(**kwargs: Any) -> Any:
        name = "Qwen2VLImageProcessorPil"  # transformers 5; before that the slow one
        cls = getattr(transformers, name, None) or transformers.Qwen2VLImageProcessor
        return cls(**kwargs)

    return make
