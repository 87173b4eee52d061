"""Embeddings against recorded outputs of the official code (float32, 1e-5)."""

from __future__ import annotations

import random

import pytest
import torch

import ume_models

pytestmark = pytest.mark.compat

TOLERANCE = 1e-5
VARIANTS = {
    "disc_k8": {"context": "disc", "latent_steps": 8},
    "prefix_last_k4": {"context": "prefix_last", "latent_steps": 4},
    "none_k2": {"context": "none", "latent_steps": 2},
    "no_moe_k8": {"context": "none", "latent_steps": 8},
    "k0": {"context": "disc", "latent_steps": 0},
    "exclude_0_3_k8": {"context": "disc", "latent_steps": 8, "exclude_experts": (0, 3)},
    "disc": {"mode": "disc"},
    "prefix_last": {"mode": "last"},
}


def model_for(load_recorded, engine, variant):
    return load_recorded(engine=engine, adapter=variant != "no_moe_k8")


def worst(got, recorded, names, variant):
    expected = torch.stack([recorded.expected(n, variant) for n in names])
    assert got.dtype == torch.float32
    return float((got - expected).abs().max())


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_alone(load_recorded, recorded, engine, variant):
    model = model_for(load_recorded, engine, variant)
    for name in recorded.names:
        got = model.embed(**recorded.inputs(name), **VARIANTS[variant])
        assert worst(got, recorded, [name], variant) <= TOLERANCE, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_cases_as_one_ragged_batch(load_recorded, recorded, variant, side):
    model = model_for(load_recorded, "fast", variant)
    batch = recorded.batch(recorded.names, side, pad_id=0)
    got = model.embed(**batch, **VARIANTS[variant])
    assert worst(got, recorded, recorded.names, variant) <= TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_batches(load_recorded, recorded, seed):
    names = list(recorded.names)
    random.Random(seed).shuffle(names)
    model = load_recorded(engine="fast")
    for variant in ("disc_k8", "exclude_0_3_k8", "disc"):
        batch = recorded.batch(names, ("left", "right")[seed % 2], pad_id=3)
        got = model.embed(**batch, **VARIANTS[variant])
        assert worst(got, recorded, names, variant) <= TOLERANCE


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_trace_equals_the_recorded_states(load_recorded, recorded, engine):
    model = load_recorded(engine=engine)
    for name in recorded.names:
        _, trace = model.embed(**recorded.inputs(name), return_trace=True)
        latents = recorded.tensors[f"{name}.disc_k8.latents"]
        anchor = recorded.tensors[f"{name}.disc_k8.anchor"]
        # hidden states are not normalised: their size is about 5 to 20
        assert trace.latents.shape == (1, 8, latents.shape[-1])
        torch.testing.assert_close(trace.latents[0], latents, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(trace.anchor[0], anchor, rtol=1e-5, atol=1e-4)


def test_an_explicit_prefix_is_not_added_twice(load_recorded, recorded):
    model = load_recorded(engine="fast")
    inputs = recorded.inputs("text_only")
    prefix = torch.tensor([model.prefix_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], prefix], dim=1)
    assert worst(model.embed(**inputs), recorded, ["text_only"], "disc_k8") <= TOLERANCE


def test_batch_mates_do_not_matter(load_recorded, recorded):
    model = load_recorded(engine="fast")
    alone = model.embed(**recorded.inputs("image_wide"))[0]
    for mates in (["text_long"], ["video_8", "two_images"], ["image_tall_large"] * 6):
        batch = recorded.batch([*mates, "image_wide"], "left", pad_id=0)
        assert float((model.embed(**batch)[-1] - alone).abs().max()) <= 2e-6


def test_batch_mates_stay_within_bfloat16_rounding(load_recorded, recorded):
    """A row alone and the same row among others differ by less than either from the truth."""
    model = load_recorded(engine="fast", dtype="bfloat16")
    eager = load_recorded(engine="reference", dtype="bfloat16")
    together = model.embed(**recorded.batch(recorded.names, "left", pad_id=0))
    moved = rounding = 0.0
    for row, name in enumerate(recorded.names):
        inputs = recorded.inputs(name)
        moved += float((model.embed(**inputs)[0] - together[row]).norm())
        rounding += float((eager.embed(**inputs)[0] - recorded.expected(name, "disc_k8")).norm())
    assert moved <= 2 * rounding


def test_bfloat16_error_is_at_most_twice_the_official_paths(
    load_recorded, recorded, checkpoint_dir
):
    fast = load_recorded(engine="fast", dtype="bfloat16")
    eager = load_recorded(engine="reference", dtype="bfloat16")
    # the truth is float32 arithmetic on the very weights that were rounded to bfloat16
    exact = ume_models.load(checkpoint_dir, dtype="float32")
    exact.load_state_dict({k: v.float() for k, v in fast.state_dict().items()})
    errors = {"fast": 0.0, "eager": 0.0}
    for name in recorded.names:
        inputs = recorded.inputs(name)
        expected = exact.embed(**inputs)
        errors["fast"] += float((fast.embed(**inputs) - expected).norm())
        errors["eager"] += float((eager.embed(**inputs) - expected).norm())
    assert errors["eager"] > 1e-3, "bfloat16 did not round anything"
    assert errors["fast"] <= 2 * errors["eager"], errors
