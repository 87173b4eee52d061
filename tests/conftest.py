"""Shared by all tests: the recorded cases and the checkpoint they were recorded with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Read when Triton is imported: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

RECORDED = Path(__file__).parent / "conformance" / "plume_tiny"
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class Recorded:
    """Recorded inputs and outputs of the official code."""

    tensors: dict[str, torch.Tensor]
    names: list[str]

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        """Arguments of ``embed`` for one case."""
        media = {k: self.tensors[f"{name}.{k}"] for k in MEDIA if f"{name}.{k}" in self.tensors}
        return {"input_ids": self.tensors[f"{name}.input_ids"][None], **media}

    def batch(self, names: list[str], side: str, pad_id: int) -> dict[str, torch.Tensor]:
        """Several cases as one padded batch."""
        ids = [self.tensors[f"{n}.input_ids"] for n in names]
        longest = max(len(i) for i in ids)
        padded = torch.full((len(ids), longest), pad_id)
        mask = torch.zeros_like(padded)
        for row, one in enumerate(ids):
            where = slice(longest - len(one), None) if side == "left" else slice(0, len(one))
            padded[row, where], mask[row, where] = one, 1
        out = {"input_ids": padded, "attention_mask": mask}
        for key in MEDIA:
            parts = [self.tensors[f"{n}.{key}"] for n in names if f"{n}.{key}" in self.tensors]
            if parts:
                out[key] = torch.cat(parts)
        return out

    def expected(self, name: str, variant: str) -> torch.Tensor:
        """Recorded embedding ``[D]``."""
        return self.tensors[f"{name}.{variant}.embedding"]


@pytest.fixture(scope="session")
def recorded() -> Recorded:
    names = [c["name"] for c in json.loads((RECORDED / "cases.json").read_text())["cases"]]
    return Recorded(load_file(RECORDED / "cases.safetensors"), names)


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    return RECORDED / "checkpoint"


@pytest.fixture
def copied_checkpoint(tmp_path: Path, checkpoint_dir: Path) -> Path:
    """A copy that a test may damage."""
    target = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_dir, target)
    return target


@pytest.fixture(scope="session")
def load_recorded(checkpoint_dir: Path) -> Callable[..., Any]:
    """``ume_models.load`` of the recorded checkpoint, one model per set of options."""
    import ume_models

    loaded: dict[tuple[tuple[str, Any], ...], Any] = {}

    def get(**options: Any) -> Any:
        # the recordings have no decode loop after the suffix
        options.setdefault("max_new_tokens", 0)
        key = tuple(sorted(options.items()))
        if key not in loaded:
            loaded[key] = ume_models.load(checkpoint_dir, **options)
        return loaded[key]

    return get
