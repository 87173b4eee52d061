"""Other homes of the same parts: older layouts, VLM2Vec's model, the official latent adapter."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from ume_models.errors import PatchError
from ume_models.patching import apply, revert, versions
from ume_models.patching.changes import InstanceForward

pytestmark = pytest.mark.compat

ids = torch.arange(3, 20)[None]
ADAPTER = Path(__file__).parents[1] / "standins" / "plume" / "plume" / "train" / "latent_moe.py"


def older_layout(model, text):
    """As transformers had it up to 4.51, and VLM2Vec's copies have it: decoder beside tower."""

    class Qwen2VLForConditionalGeneration(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = model.model.visual
            self.model = text
            self.lm_head = model.lm_head

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return self.lm_head(self.model(input_ids, attention_mask, **kwargs).last_hidden_state)

    return Qwen2VLForConditionalGeneration()


@torch.no_grad()
def test_decoder_beside_the_tower(build, text_of):
    model = build()
    older = older_layout(model, text_of(model))
    expected = older(ids)
    report = apply(older)
    assert [e.target for e in report.repaired] == ["model"]
    targets = {e.target for e in report.replaced}
    assert {"visual.patch_embed", "model.layers.*.mlp (2)"} <= targets
    torch.testing.assert_close(older(ids), expected, rtol=1e-5, atol=1e-5)
    cache = older.model(ids[:, :12], use_cache=True).past_key_values
    short = torch.ones(1, 5, dtype=torch.long)
    suffix = older(ids[:, 12:], short, past_key_values=cache)
    torch.testing.assert_close(suffix, expected[:, 12:], rtol=1e-4, atol=1e-5)


class MMEBModel(nn.Module):
    """As much of VLM2Vec's as its instances are recognised by."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.pooling, self.normalize, self.temperature = "last", True, 0.02

    def encode_input(self, input):
        return self.encoder(**input, output_hidden_states=True).hidden_states[-1][:, -1]

    def forward(self, qry=None, tgt=None, *args, **kwargs):
        return self.encode_input(qry) @ self.encode_input(tgt).T


def test_vlm2vec_model(build, monkeypatch):
    model = MMEBModel(build())
    with pytest.raises(PatchError, match="encode_input"):
        apply(model)  # not VLM2Vec's own class
    monkeypatch.setattr(versions, "unknown", lambda *told: None)
    report = apply(model)
    assert report.subject == "MMEBModel"
    assert {"encode_input", "forward"} <= {e.target for e in report.replaced}
    assert {e.target for e in report.repaired} >= {"encoder.model.language_model"}
    assert isinstance(vars(model)["encode_input"], InstanceForward)
    again = apply(model)
    assert not again.changes
    revert(copy.deepcopy(model))
    assert "encode_input" in vars(model)
    revert(report)
    assert not {"encode_input", "forward"} & set(vars(model))
    assert not any("forward" in vars(m) for m in model.modules())


def with_adapter(model):
    spec = importlib.util.spec_from_file_location("standin_latent_moe", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(5)
    model.latent_moe_transition = module.LatentMoETransition(32, num_experts=4, top_k=2).eval()
    return model


def test_official_latent_adapter(build):
    model = with_adapter(build())
    z, context = torch.randn(3, 32), torch.randn(3, 32)
    expected, aux = model.latent_moe_transition(z, 2, context)
    report = apply(model)
    by = {e.target: e.by for e in report.replaced}
    assert by["latent_moe_transition"] == "ume_kernels.moe_transition"
    assert isinstance(vars(model.latent_moe_transition)["forward"], InstanceForward)
    # its own parts are replaced as one
    inner = list(model.latent_moe_transition.modules())[1:]
    assert inner
    assert not any("forward" in vars(m) for m in inner)
    found, found_aux = model.latent_moe_transition(z, 2, context)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found_aux.keys() == aux.keys()
    keys = list(model.state_dict())
    revert(report)
    assert list(model.state_dict()) == keys
    assert "forward" not in vars(model.latent_moe_transition)


def test_adapter_with_other_parts_is_left_alone_with_the_reason(build):
    model = with_adapter(build())
    model.latent_moe_transition.router = nn.Identity()
    report = apply(model)
    told = {e.target: e.reason for e in report.left_alone}
    assert "router is a Identity" in told["latent adapter (1)"]
