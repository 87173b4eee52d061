"""Embeddings of the recorded cases with Triton's kernels (float32, 1e-5).

Without a GPU the kernels run in Triton's interpreter, see tests/conftest.py. It takes milliseconds
per program, so rows and steps are few: what a kernel does is the same in every step.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this on the GPU"),
]

TOLERANCE = 1e-5
ROLLOUT = "moe_transition:triton,decode:triton"
PREFILL = "rms_norm:triton,rope_append:triton,silu_mul:triton"


def worst(got, recorded, names, variant):
    expected = torch.stack([recorded.expected(name, variant) for name in names])
    return float((got - expected).abs().max())


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("prefix_last_k4", {"context": "prefix_last", "latent_steps": 4}),
        ("none_k2", {"context": "none", "latent_steps": 2}),
        ("k0", {"context": "disc", "latent_steps": 0}),
    ],
)
def test_one_ragged_batch(load_recorded, recorded, monkeypatch, variant, options):
    model = load_recorded(engine="fast")
    names = recorded.names[::4]  # three rows of different lengths
    batch = recorded.batch(names, "left", pad_id=0)
    monkeypatch.setenv("UME_BACKEND", ROLLOUT)
    assert worst(model.embed(**batch, **options), recorded, names, variant) <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "backends", "options"),
    [
        ("exclude_0_3_k8", ROLLOUT, {"context": "disc", "exclude_experts": (0, 3)}),
        ("none_k2", f"{ROLLOUT},{PREFILL}", {"context": "none", "latent_steps": 2}),
    ],
)
def test_one_row(load_recorded, recorded, monkeypatch, variant, backends, options):
    """The forms for one row; the prefill's kernels, with a program per token, for a short one."""
    model = load_recorded(engine="fast")
    name = min(recorded.names, key=lambda n: recorded.tensors[f"{n}.input_ids"].numel())
    monkeypatch.setenv("UME_BACKEND", backends)
    got = model.embed(**recorded.inputs(name), **options)
    assert worst(got, recorded, [name], variant) <= TOLERANCE
