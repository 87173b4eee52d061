"""The rivals of the benchmarks compute what they are compared with, and sizes are checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

# Plain `pytest` leaves the root, where benchmarks/ is, out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import floor, record, scale
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
from benchmarks.similarity_engines import Corpus, corpus, official, on_cpu
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
    official = TransformersPreprocessing(processor, encode_anew)
    ids, pixels = official(item)
    assert torch.equal(ids, ours.input_ids)
    assert torch.equal(pixels, ours.pixel_values)


def test_a_size_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv(scale.VARIABLE, "huge")
    with pytest.raises(ValueError, match=r"huge.*tiny, small, full"):
        scale.scale()


class Fixture:
    """What ``record`` needs of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, work, rounds, iterations):
        for _ in range(rounds):
            work()


def recorded(group, engine="e", **options):
    fixture, calls = Fixture(), []
    options = {"section": "s", "role": "ours", "filled": False, **options}
    record.record(fixture, lambda: calls.append("work"), group=group, engine=engine, **options)
    return fixture.extra_info, calls


@pytest.fixture
def small(monkeypatch):
    """Sizes of a measurement, with work that takes no time."""
    monkeypatch.setenv(scale.VARIABLE, "small")
    monkeypatch.setattr(record, "_PLANNED", {})


@pytest.mark.usefixtures("small")
def test_rounds_and_warm_up_are_noted():
    info, calls = recorded("g", rounds=4, warm_up=0)
    assert (info["rounds"], info["warm_up"], len(calls)) == (4, 0, 4)
    assert recorded("h")[0]["rounds"] == scale.scale().rounds
    others = []
    _, calls = recorded("i", rounds=2, warm_up=1, warm=lambda: others.append("warm"))
    assert len(calls) == 2, "the warm-up is of other inputs"
    assert others


def test_a_try_is_of_one_round(monkeypatch):
    monkeypatch.setenv(scale.VARIABLE, "tiny")
    monkeypatch.setattr(record, "_PLANNED", {})
    assert recorded("g", rounds=4)[0]["rounds"] == 1
    with pytest.raises(ValueError, match="g: other gets 2 rounds"):
        recorded("g", "other", rounds=2)  # what would be unequal is found in a try


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("unequal", [{"rounds": 1}, {"warm_up": 0}, {"rounds": None}])
def test_engines_of_a_group_get_the_same_rounds(unequal):
    recorded("g", rounds=3, warm_up=1)
    recorded("g", "equal", rounds=3, warm_up=1)
    recorded("another", rounds=1, warm_up=0)
    with pytest.raises(ValueError, match=r"g: other gets \d rounds after \d calls, .* 3 after 1"):
        recorded("g", "other", **{"rounds": 3, "warm_up": 1, **unequal})


@pytest.mark.usefixtures("small")
def test_what_runs_on_the_cpu_gets_no_energy_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "synchronize", lambda device: None)
    monkeypatch.setattr(record, "describe", dict)
    monkeypatch.setattr(record, "energy", lambda body, samples: {"energy_joules": 1.0, "nvml": {}})
    info, _ = recorded("g")
    assert (info["engine"], info["energy_joules"]) == ("e", 1.0)
    info, _ = recorded("g", on_cpu=True)
    assert info["engine"] == "e (CPU)"
    assert not {"energy_joules", "nvml"} & set(info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recorded("g", on_cpu=True)[0]["engine"] == "e", "all of that machine is"


def test_the_official_search_in_blocks_finds_the_same():
    data = corpus(7, 40, 8)
    whole = official(data, 5)()
    assert torch.equal(whole, official(data, 5, block=3)())
    assert torch.equal(whole[:4], official(data.first(4), 5, block=3)())
    assert torch.equal(whole, (data.q32 @ data.c32.T).topk(5).indices)
    on_gpu = Corpus(*(x.to("meta") for x in (data.q16, data.c16, data.q32, data.c32)))
    with pytest.raises(TypeError):
        official(on_gpu, 5)  # nothing is brought to the host, before or in the time
    assert on_cpu("official numpy dot + argsort")
    assert not on_cpu("similarity_topk fp32")


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


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [("floor", ["--help"], 0), ("floor", ["nothing.json"], 2), ("loss_memory", ["--help"], 1)],
)
def test_wrong_arguments_are_no_traceback(module, arguments, code):
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr and "usage" in ended.stdout + ended.stderr
