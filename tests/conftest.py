"""Shared by all tests: the recorded cases and the checkpoint they were recorded with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

# Read when Triton is imported: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest --hypothesis-profile=ci: a third of the examples, the same ones every time.
settings.register_profile("full", max_examples=60, deadline=None)
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("full")

CONFORMANCE = Path(__file__).parent / "conformance"
RECORDED = CONFORMANCE / "plume_tiny"
OFFICIAL = CONFORMANCE / "processing_official"
# What VLM2Vec's data sets ask, as chosen for the recordings.
VLM2VEC_INSTRUCTIONS = {
    ("image", "query"): "Represent the given image with the following question:",
    ("image", "candidate"): "Represent the given image.",
    ("video", "query"): "Find the clip that corresponds to the given sentence and video segment:",
    ("video", "candidate"): "Understand the content of the provided video.",
    ("text", "query"): "Find an image that matches the given caption:",
}
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


class RecordedInputs:
    """What the official code of one convention fed its model for the shared pictures and clips.

    Args:
        path: recording, without its suffix.
    """

    def __init__(self, path: Path) -> None:
        self.cases = {case["key"]: case for case in json.loads(Path(f"{path}.json").read_text())}
        self._tensors = load_file(f"{path}.safetensors")
        shared = json.loads((OFFICIAL / "cases.json").read_text())["cases"]
        self._shared = {case["name"]: case for case in shared}

    def text(self, key: str) -> str:
        """The shared text of a case."""
        text: str = self._shared[key.split(".")[0]]["text"]
        return text

    def parts(self, key: str) -> dict[str, str]:
        """Instruction and text of a case where VLM2Vec's data sets keep them apart."""
        name, side = key.split(".")
        kind = "image" if name == "two_images" else name.split("_")[0]
        texts = side == "query" or kind == "text"
        return {
            "instruction": VLM2VEC_INSTRUCTIONS.get((kind, side), ""),
            "text": self.text(key) if texts else "",
        }

    def media(self, key: str) -> dict[str, list[Path]]:
        """The fields of an item with the media of a case."""
        case = self._shared.get(key.split(".")[0], {})
        fields = {k: case[k] for k in ("images", "video") if k in case}
        return {name: [OFFICIAL / file for file in files] for name, files in fields.items()}

    def check(self, processor: Any, key: str, *items: dict[str, Any]) -> None:
        """Each of the items, which must be one and the same, gives what was recorded."""
        case = self.cases[key]
        plans = processor.plan([{**item, **self.media(key)} for item in items])
        assert {plan.digest for plan in plans} == {plans[0].digest}, key
        assert plans[0].num_tokens == case["tokens"], key
        made = processor.load(plans[0])
        assert made.input_ids.tolist() == self._tensors[f"{key}.input_ids"].tolist(), key
        for kind in ("pixel_values", "pixel_values_videos"):
            grid = kind.replace("pixel_values_videos", "video").replace("pixel_values", "image")
            self._check_pixels(key, kind, f"{grid}_grid_thw", made)

    def _check_pixels(self, key: str, kind: str, grid: str, made: Any) -> None:
        expected = self._tensors.get(f"{key}.{grid}")
        if expected is None:
            assert getattr(made, kind) is None, key
            return
        assert torch.equal(getattr(made, grid), expected.long()), key
        case, pixels = self.cases[key], getattr(made, kind)
        stored = f"{case.get('pixels_as', key)}.{kind}"
        got = pixels[self._tensors[f"{stored}.rows"].long()]
        # recorded in float16; a grey level is 0.015
        torch.testing.assert_close(
            got, self._tensors[f"{stored}.values"].float(), atol=1e-3, rtol=0
        )
        mean = pixels.mean(dtype=torch.float64).item()
        assert mean == pytest.approx(case["mean"], abs=1e-6), key
        squares = pixels.square().mean(dtype=torch.float64).item()
        assert squares == pytest.approx(case["mean_of_squares"], abs=1e-6), key


@pytest.fixture(scope="session")
def recorded_inputs() -> Callable[[str], RecordedInputs]:
    """``RecordedInputs`` of a file under ``conformance``, such as ``processing_families/gme``."""
    return lambda name: RecordedInputs(CONFORMANCE / name)


@pytest.fixture(scope="session")
def family_processor() -> Callable[..., Any]:
    """The processor of a profile, with the families' tokenizer and no checkpoint's limits."""
    from transformers import AutoTokenizer

    from ume_models.processing import ImageConfig, Processor

    tokenizer = AutoTokenizer.from_pretrained(CONFORMANCE / "family_seen" / "checkpoint")

    def make(profile: Any, **rules: Any) -> Processor:
        chosen = replace(profile.rules, **rules)
        return Processor(tokenizer, profile.template(tokenizer), ImageConfig(), chosen)

    return make


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
