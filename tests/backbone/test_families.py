"""Our layers against transformers' for both model families, under every supported version."""

from __future__ import annotations

import pytest
import torch

import ume_models
from ume_models.backbone.transformers_model import build_transformers_model

pytestmark = pytest.mark.compat

GRIDS = [(1, 4, 6), (1, 12, 10), (3, 8, 4), (1, 2, 2), (1, 2, 2)]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def directory(request, checkpoint_dir, qwen25_checkpoint):
    return checkpoint_dir if request.param == "qwen2_vl" else qwen25_checkpoint


@pytest.fixture(scope="module")
def model(directory):
    return ume_models.load(directory, max_new_tokens=0)


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_tower_equals_transformers(model, attention):
    theirs = build_transformers_model(
        model.config, model.state_dict(), model.config.vocab_size, attention
    )
    torch.manual_seed(0)
    for grids in ([g] for g in GRIDS):
        patches = torch.randn(sum(t * h * w for t, h, w in grids), model.config.vision.patch_dim)
        expected = theirs.model.visual(patches, grid_thw=torch.tensor(grids))
        if not isinstance(expected, torch.Tensor):
            expected = expected.pooler_output
        got = model.visual(patches, grids)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_packed_images_equal_single_images(model):
    torch.manual_seed(0)
    parts = [torch.randn(t * h * w, model.config.vision.patch_dim) for t, h, w in GRIDS]
    packed = model.visual(torch.cat(parts), GRIDS)
    alone = torch.cat([model.visual(p, [g]) for p, g in zip(parts, GRIDS, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_vision_refuses_grids_that_do_not_fit(model):
    with pytest.raises(ValueError, match="describe 24 patches, but 23 were given"):
        model.visual(torch.zeros(23, model.config.vision.patch_dim), [(1, 4, 6)])


def test_fast_engine_equals_the_official_loop(directory, model, recorded):
    """End to end, every recorded input as one batch; for Qwen2.5-VL this is the only oracle."""
    official = ume_models.load(directory, engine="reference", max_new_tokens=0)
    batch = recorded.batch(recorded.names, "left", pad_id=0)
    for options in ({}, {"context": "prefix_last", "latent_steps": 3}, {"mode": "disc"}):
        expected = official.embed(**batch, **options)
        got = model.embed(**batch, **options)
        assert float((got - expected).abs().max()) <= 1e-5, options
