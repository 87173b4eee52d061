"""The recorded outputs of the official code, reproduced on a GPU in float32."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu(dry=True)

# As on the CPU. The GPU sums in another order and its exp and erf differ in the last bit; on a unit
# vector that is about 1e-6, and no TF32 is in play (conftest).
TOLERANCE = 1e-5
VARIANTS = {
    "disc_k8": {"context": "disc", "latent_steps": 8},
    "prefix_last_k4": {"context": "prefix_last", "latent_steps": 4},
    "none_k2": {"context": "none", "latent_steps": 2},
    "k0": {"context": "disc", "latent_steps": 0},
    "exclude_0_3_k8": {"context": "disc", "latent_steps": 8, "exclude_experts": (0, 3)},
    "disc": {"mode": "disc"},
    "prefix_last": {"mode": "last"},
}


@pytest.fixture
def model(load_recorded, device):
    return load_recorded(engine="fast", device=str(device), dtype="float32")


def on(inputs, device):
    return {key: value.to(device) for key, value in inputs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_alone(model, recorded, device, variant):
    for name in recorded.names:
        got = model.embed(**on(recorded.inputs(name), device), **VARIANTS[variant])
        difference = (got[0].cpu() - recorded.expected(name, variant)).abs().max()
        assert float(difference) <= TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_cases_as_one_ragged_batch(model, recorded, device, variant):
    batch = on(recorded.batch(recorded.names, "left", pad_id=0), device)
    got = model.embed(**batch, **VARIANTS[variant]).cpu()
    expected = torch.stack([recorded.expected(n, variant) for n in recorded.names])
    assert float((got - expected).abs().max()) <= TOLERANCE


def test_trace_equals_the_recorded_states(model, recorded, device):
    for name in recorded.names:
        _, trace = model.embed(**on(recorded.inputs(name), device), return_trace=True)
        # hidden states are not normalised: their size is about 5 to 20
        torch.testing.assert_close(
            trace.latents[0], recorded.tensors[f"{name}.disc_k8.latents"], rtol=1e-5, atol=1e-4
        )
