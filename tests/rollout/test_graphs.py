"""Recorded rollouts. On the CPU a recording is the closure itself, run again on its buffers.

What a CUDA graph freezes (addresses, shapes, host values) is frozen in the closure too, so a
replay with other lengths, inputs and rows shows whether anything depends on the first batch.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import ume_models
from tests.support.recorder import Rerun
from ume_models.backbone.structure import Structure
from ume_models.rollout.engine import Engine
from ume_models.rollout.graphs import GraphPool


@pytest.fixture(scope="module")
def eager(checkpoint_dir):
    return ume_models.load(checkpoint_dir, max_new_tokens=0)


@pytest.fixture
def make(eager):
    """A copy of the model whose rollouts go through the given pool."""

    def build(recorder, layers=None, **limits):
        model = copy.deepcopy(eager)
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model._structure = Structure(model)
        pool = GraphPool(recorder, **limits)
        model._rollout = Engine(model.config, model.model, model.visual, pool)
        return model, pool

    return build


def difference(a, b):
    return float((a - b).abs().max())


def batches(recorded):
    """Other rows, other orders and other lengths, up to four rows: one bucket, then another."""
    names = recorded.names
    return [names[:4], names[1:4], [names[3], names[0], names[2]], names[:1], names[::-1][:2]]


@pytest.mark.parametrize("options", [{}, {"context": "none"}, {"exclude_experts": (1,)}])
def test_replays_equal_the_eager_loop(make, eager, recorded, options):
    recorder = Rerun()
    model, pool = make(recorder)
    runs = batches(recorded) * 2
    for names in runs:
        batch = recorded.batch(names, "right", pad_id=0)
        got, trace = model.embed(**batch, **options, latent_steps=3, return_trace=True)
        expected, wanted = eager.embed(**batch, **options, latent_steps=3, return_trace=True)
        assert difference(got, expected) <= 2e-6, names
        for field in ("latents", "anchor", "hidden"):
            mine, theirs = getattr(trace, field), getattr(wanted, field)
            assert mine.shape == theirs.shape
            assert difference(mine, theirs) <= 1e-4 * max(1.0, float(theirs.abs().max()))
    assert recorder.replays == len(runs)
    assert len(pool) == recorder.recorded < len(runs) / 2, "batches of a bucket share one"


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_any_number_of_steps(make, eager, recorded, steps):
    model, _ = make(Rerun())
    for side in ("left", "right"):
        batch = recorded.batch(recorded.names[:3], side, pad_id=0)
        got = model.embed(**batch, latent_steps=steps)
        assert difference(got, eager.embed(**batch, latent_steps=steps)) <= 2e-6


def test_padding_rows_are_empty_and_results_are_copies(make, recorded):
    recorder = Rerun()
    model, pool = make(recorder)
    first = model.embed(**recorded.batch(recorded.names[:4], "right", pad_id=0))
    kept = first.clone()
    model.embed(**recorded.batch(recorded.names[1:4], "right", pad_id=0))
    (entry,) = pool._entries.values()
    lengths = entry.inputs["lengths"].tolist()
    assert lengths[3] == 0 < min(lengths[:3])
    assert not entry.inputs["z"][3].any()
    assert torch.equal(first, kept)


@pytest.mark.interpreted
def test_what_is_not_a_rows_own_is_never_read(make, recorded, monkeypatch):
    """Triton's kernels over an arena of NaN, three rows in a bucket of four.

    One layer of the model: the interpreter is slow.
    """
    names = ["text_only", "image_wide", "text_long"]
    batch = recorded.batch(names, "right", pad_id=0)
    expected = make(Rerun(), layers=1)[0].embed(**batch, latent_steps=2)
    model, pool = make(Rerun(), layers=1)
    monkeypatch.setenv("UME_BACKEND", "decode:triton")
    rollout = model.rollout
    rollout.arena.begin([500] * 4, 0, finite=False).fill_(float("nan"))
    got = model.embed(**batch, latent_steps=2)
    assert rollout is model.rollout
    assert torch.isnan(rollout.arena._storage).any(), "nothing was cleared"
    assert difference(got, expected) <= 1e-5
    assert len(pool) == 1


def test_the_least_recently_used_goes_first(make, recorded):
    recorder = Rerun()
    model, pool = make(recorder, max_graphs=2)

    def embed(steps):
        model.embed(**recorded.inputs("text_only"), latent_steps=steps)
        return recorder.recorded

    assert [embed(k) for k in (1, 2, 1, 3)] == [1, 2, 2, 3]
    assert len(pool) == 2
    assert recorder.drained == 1, "a graph may be replaying when it is dropped"
    assert [embed(k) for k in (1, 3, 2)] == [3, 3, 4]


def test_a_growing_arena_drops_all(make, eager, recorded):
    recorder = Rerun()
    model, pool = make(recorder)
    small = recorded.inputs("text_only")
    model.embed(**small)
    at = model.rollout.arena.address
    assert at != 0
    batch = recorded.batch(recorded.names, "right", pad_id=0)
    assert difference(model.embed(**batch), eager.embed(**batch)) <= 2e-6
    assert len(pool) == 1
    assert difference(model.embed(**small), eager.embed(**small)) <= 2e-6
    assert recorder.recorded == 3
    model.rollout.arena.release()
    assert len(pool) == 0
    assert model.rollout.arena.address == 0
    assert difference(model.embed(**small), eager.embed(**small)) <= 2e-6


def test_moved_weights_drop_all(make, recorded):
    recorder = Rerun()
    model, pool = make(recorder)
    inputs = recorded.inputs("text_only")
    before = model.embed(**inputs)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 1.5
    after = model.embed(**inputs)
    assert recorder.recorded == 2
    assert len(pool) == 1
    fresh = ume_models.load(model.sources[0], max_new_tokens=0)
    fresh.load_state_dict(model.state_dict())
    assert difference(after, fresh.embed(**inputs)) <= 2e-6
    assert difference(after, before) > 1e-4


def test_a_failed_recording_warns_once_and_runs_eagerly(make, eager, recorded):
    model, pool = make(Rerun(error=RuntimeError("unsupported")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for names in batches(recorded):
            batch = recorded.batch(names, "right", pad_id=0)
            assert difference(model.embed(**batch), eager.embed(**batch)) <= 2e-6
    (message,) = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert "no graphs today" in message
    assert not pool.enabled


def test_out_of_memory_while_recording_costs_one_key_only(make, eager, recorded):
    recorder = Rerun(error=torch.OutOfMemoryError("full"))
    model, pool = make(recorder)
    inputs = recorded.inputs("text_only")
    expected = eager.embed(**inputs)
    with pytest.warns(RuntimeWarning, match="no graphs today"):
        assert difference(model.embed(**inputs), expected) <= 2e-6
    recorder.error = None
    model.embed(**inputs)
    assert recorder.recorded == 0
    model.embed(**inputs, latent_steps=1)
    assert recorder.recorded == len(pool) == 1


def test_errors_of_the_work_itself_are_the_callers():
    pool = GraphPool(Rerun())

    def body(inputs):
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="mine"):
        pool.run("key", 0, {"z": torch.zeros(1, 2)}, 1, [(1, 2)], body)
    assert pool.enabled


def double(inputs):
    return (inputs["z"] * 2,)


def test_memory_is_bounded():
    recorder = Rerun(sizes=[60, 60, 60, 30])
    pool = GraphPool(recorder, max_bytes=100)

    def run(key):
        return pool.run(key, 0, {"z": torch.ones(1, 2)}, 2, [(2, 2)], double)

    assert run("a") is not None
    assert run("b") is not None, "made again, alone, in a new pool"
    assert (recorder.recorded, recorder.pools > 0) == (3, True)
    assert (len(pool), pool.nbytes) == (1, 60)
    assert run("c") is not None
    assert (len(pool), pool.nbytes) == (2, 90)


def test_one_that_is_too_large_stays_eager():
    recorder = Rerun(sizes=[500])
    pool = GraphPool(recorder, max_bytes=100)
    with pytest.warns(RuntimeWarning, match="500 bytes, more than the 100"):
        assert pool.run("a", 0, {"z": torch.ones(1, 2)}, 2, [(2, 2)], double) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pool.run("a", 0, {"z": torch.ones(1, 2)}, 2, [(2, 2)], double) is None
    assert recorder.recorded == 1
    assert (len(pool), pool.nbytes) == (0, 0)


def test_only_cuda_devices_record_by_themselves(monkeypatch):
    assert not GraphPool.for_device(torch.device("cpu")).enabled
    assert GraphPool.for_device(torch.device("cuda", 0)).enabled, "nothing is touched before use"
    monkeypatch.setenv("UME_GRAPHS", "0")
    assert not GraphPool.for_device(torch.device("cuda", 0)).enabled
    with pytest.raises(ValueError, match="at least 1"):
        GraphPool(None, max_graphs=0)
