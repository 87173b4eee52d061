"""A patched transformers model on a GPU."""

from __future__ import annotations

import pytest
import torch

from ume_models.backbone.checkpoint import read_state
from ume_models.backbone.config import read_config
from ume_models.backbone.transformers_model import build_transformers_model
from ume_models.errors import PatchError
from ume_models.patching import apply, revert

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def model(checkpoint_dir):
    state = read_state(checkpoint_dir)
    rows = state["model.embed_tokens.weight"].shape[0]
    return build_transformers_model(read_config(checkpoint_dir), state, rows)


@torch.no_grad()
@pytest.mark.gpu(dry=True)
def test_hidden_states(parity, device, dtype, model):
    def last():
        given = IDS.to(model.device)
        return model(input_ids=given, output_hidden_states=True).hidden_states[-1]

    truth = last().to(device)
    model.to(device, dtype)
    eager = last()
    report = apply(model)
    if device.type == "cuda":
        by = {entry.target: entry.by for entry in report.replaced}
        assert by["model.language_model.norm"] == "ume_kernels.prefill.rms_norm (triton)"
        assert any("silu_mul_ (triton)" in value for value in by.values())
    parity.check(last(), eager, truth)
    cache = model(input_ids=IDS[:, :30].to(device), use_cache=True).past_key_values
    suffix = model(
        input_ids=IDS[:, 30:].to(device),
        attention_mask=torch.ones(1, 7, dtype=torch.long, device=device),
        position_ids=torch.arange(30, 37, device=device).expand(3, 1, -1),
        past_key_values=cache,
        output_hidden_states=True,
    ).hidden_states[-1]
    parity.check(suffix, eager[:, 30:], truth[:, 30:])
    revert(report)
    torch.testing.assert_close(last(), eager)


@pytest.mark.gpu
def test_no_patching_while_a_graph_is_captured(device, model):
    model.to(device)
    x = torch.zeros(4, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(PatchError, match="CUDA graph is being captured"):
            apply(model)
    assert not any("forward" in vars(module) for module in model.modules())
