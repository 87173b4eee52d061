"""Soft tokens against the recording of LaSER's quick start, and a plain loop without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ume_models
from tests.support.recorder import Rerun
from ume_models.rollout.engine import Engine, unit_norm
from ume_models.rollout.graphs import GraphPool
from ume_models.rollout.sequence import build_sequence
from ume_models.rollout.soft_tokens import soft_tokens

FAMILY = Path(__file__).parent.parent / "conformance" / "family_seen"
NAMES = ["text_only", "text_long", "soft_0", "soft_1", "soft_2"]


@pytest.fixture(scope="module")
def cases():
    return load_file(FAMILY / "cases.safetensors")


@pytest.fixture(scope="module")
def model():
    return ume_models.load(FAMILY / "checkpoint", family="vlm2vec")


def embed(model, cases, names, states=3, pool=None):
    rows = [build_sequence(cases[f"{n}.input_ids"].numpy(), model.config) for n in names]
    engine = Engine(model.config, model.model, model.visual, pool)
    policy = soft_tokens(states, cases["soft_token.lm_head"], model.model.embed_tokens.weight)
    with torch.no_grad():
        return unit_norm(engine.run(rows, policy)[0])


@pytest.mark.parametrize("recorded", [False, True])
def test_equal_the_recording(model, cases, recorded):
    pool = GraphPool(Rerun()) if recorded else None
    for names in ([[name] for name in NAMES] + [NAMES, NAMES[::-1]]):
        expected = torch.stack([cases[f"{name}.soft_token.embedding"] for name in names])
        assert float((embed(model, cases, names, pool=pool) - expected).abs().max()) <= 2e-5


def test_one_state_is_the_last_of_the_prompt(model, cases):
    got = embed(model, cases, ["text_only"], states=1)[0]
    assert float((got - cases["text_only.last_token.embedding"]).abs().max()) <= 1e-5
