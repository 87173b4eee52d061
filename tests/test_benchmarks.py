"""The rivals of the benchmarks compute what they are compared with, and sizes are checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

# Plain `pytest` leaves the root, where benchmarks/ is, out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import floor, scale
from benchmarks.rivals.batched import BatchedTransformers
from benchmarks.rivals.official_preprocessing import TransformersPreprocessing
from benchmarks.rivals.packed_adapter import PackedAdapter
from benchmarks.shaped import (
    image_items,
    page_items,
    shaped_model,
    text_items,
    video_items,
)
from ume_kernels import MoETransition


@pytest.fixture(scope="module")
def model():
    return shaped_model("tiny", torch.float32)


def test_padded_batches_give_the_embeddings_of_the_engine(model):
    items = text_items(4) + image_items(1, tokens=9) + video_items(1, tokens=4) + page_items(1, 16)
    rival = BatchedTransformers(model, 5)
    torch.testing.assert_close(rival.encode(items), model.encode(items), rtol=1e-4, atol=1e-5)
    shorter = [items[5], items[0]]  # the same buffers with other padding
    torch.testing.assert_close(rival.encode(shorter), model.encode(shorter), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5])
def test_the_packed_adapter_computes_the_same(rows):
    torch.manual_seed(rows)
    module = MoETransition(48).eval()
    z, context = torch.randn(2, rows, 48).unbind(0)
    got = PackedAdapter(module)(z, context, torch.tensor([5]))
    torch.testing.assert_close(got, module(z, 5, context)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encode_anew", [True, False])
def test_the_official_preprocessing_gives_the_same_inputs(model, tmp_path, encode_anew):
    path = tmp_path / "grey.png"
    Image.linear_gradient("L").resize((150, 90)).save(path)
    item = {"text": "what is this?", "image": str(path)}
    processor = model.processor
    [planned] = processor.plan([item])
    ours = processor.load(planned)
    official = TransformersPreprocessing(model.tokenizer, processor.config, encode_anew)
    ids, pixels = official(item)
    assert torch.equal(ids, ours.input_ids)
    assert torch.equal(pixels, ours.pixel_values)


def test_a_size_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv(scale.VARIABLE, "huge")
    with pytest.raises(ValueError, match=r"huge.*tiny, small, full"):
        scale.scale()


def test_floors_are_compared_with_the_shapes_they_are_counted_for():
    def entry(shape, engine, **info):
        about = {"engine": engine, "samples": 2, "shape": shape, **info}
        return {"group": "one text item", "extra_info": about, "stats": {"min": 3.0}}

    results = {
        "benchmarks": [
            entry("qwen2-vl-2b", "fast", prompt_tokens=99.0),
            entry("qwen2-vl-2b", "reference"),
            entry("small", "reference", samples=1),
        ]
    }
    expected = {"one text item": {"fast": 1.5, "reference": 1.5, "tokens": 99.0}}
    assert floor.measured_cases(results) == expected
