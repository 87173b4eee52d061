"""What cannot be patched is refused with the part and the remedy, and nothing changes."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

from ume_models.errors import PatchError
from ume_models.patching import apply
from ume_models.patching.changes import InstanceForward

pytestmark = pytest.mark.compat

ids = torch.arange(3, 20)[None]


def layers_of(model):
    return next(m for m in model.modules() if "layers" in m._modules and "norm" in m._modules)


def state(model):
    """Everything that patching could change."""
    return [(id(m), type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]


def refused(model, match, **options):
    before = state(model)
    with pytest.raises(PatchError, match=match) as caught:
        apply(model, **options)
    assert state(model) == before
    return str(caught.value)


def test_unknown_model_names_what_is_known():
    message = refused(nn.Linear(2, 2), "Linear is not a model known here")
    assert "Qwen2_5_VLForConditionalGeneration" in message
    assert "MMEBModel" in message


@pytest.mark.parametrize("thing", [None, 3, {"model": 1}])
def test_what_is_no_model(thing):
    with pytest.raises(PatchError, match=type(thing).__name__):
        apply(thing)


def test_text_model_alone_is_known(build, text_of):
    text = text_of(build())
    report = apply(text)
    assert [e.target for e in report.repaired] == ["the model"]
    with torch.no_grad():
        text(input_ids=ids)


def test_vision_and_text_without_head_is_known(build):
    report = apply(build().model, logits=False)
    assert {e.target for e in report.repaired} == {"the model", "language_model"}


def missing_layers(model):
    del layers_of(model).layers
    return "has decoder layers"


def missing_norm(model):
    del layers_of(model).norm
    return r"\.norm: does not exist"


def missing_projection(model):
    del layers_of(model).layers[1].self_attn.k_proj
    return r"layers\.1\.self_attn\.k_proj: does not exist"


def renamed_mlp(model):
    layer = layers_of(model).layers[0]
    layer.feed_forward = layer.mlp
    del layer.mlp
    return r"layers\.0\.mlp\.gate_proj: does not exist \(2 more parts"


def wrong_projection(model):
    layers_of(model).layers[1].mlp.up_proj = nn.Linear(32, 47, bias=False)
    return r"layers\.1\.mlp\.up_proj: maps 32 to 47 features, expected 32 to 48"


def wrong_weight(model):
    layers_of(model).layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 31))
    return r"layers\.1\.mlp\.up_proj: maps 31 to 48 features, expected 32 to 48"


def wrong_norm(model):
    layers_of(model).layers[0].input_layernorm.weight = nn.Parameter(torch.ones(31))
    return r"input_layernorm\.weight: is \(31,\), expected \(32,\)"


def other_norm(model):
    layers_of(model).norm = nn.LayerNorm(32)
    return r"norm: is torch\.nn\.modules\.normalization\.LayerNorm, expected an RMSNorm"


def missing_tower(model):
    tower = next(m for m in model.modules() if "patch_embed" in m._modules)
    del tower.blocks
    return "has vision blocks"


def missing_merger(model):
    tower = next(m for m in model.modules() if "patch_embed" in m._modules)
    tower.merger = nn.Identity()
    return r"merger\.ln_q: does not exist"


TREES = [
    missing_layers,
    missing_norm,
    missing_projection,
    renamed_mlp,
    wrong_projection,
    wrong_weight,
    wrong_norm,
    other_norm,
    missing_tower,
    missing_merger,
]


@pytest.mark.parametrize("damage", TREES, ids=lambda f: f.__name__)
def test_half_matching_tree(build, damage):
    model = build()
    refused(model, damage(model))


@pytest.mark.parametrize("damage", TREES[1:8], ids=lambda f: f.__name__)
def test_lenient_patches_the_rest_and_lists_it(build, damage):
    model = build()
    damage(model)
    report = apply(model, strict=False)
    assert report.missing
    assert report.repaired
    assert any("patch_embed" in e.target for e in report.replaced)
    if damage in (missing_projection, wrong_norm):
        assert any(e.target.endswith("layers.*.mlp (2)") for e in report.replaced)
    if damage in (wrong_projection, wrong_weight):
        assert any(e.target.endswith("layers.*.mlp (1)") for e in report.replaced)
        broken = layers_of(model).layers[1].mlp
        assert "forward" not in vars(broken)


def foreign_function(model):
    module = layers_of(model).layers[0].mlp

    def forward(self, x):
        return type(self).forward(self, x)

    forward.__module__ = "liger_kernel.transformers.swiglu"
    vars(module)["forward"] = types.MethodType(forward, module)
    return r"layers\.0\.mlp: its forward was already replaced, by liger_kernel\.transformers"


def foreign_partial(model):
    module = layers_of(model)
    vars(module)["forward"] = functools.partial(type(module).forward, module, use_cache=False)
    return r"its forward was already replaced, by transformers"


def offloaded(model):
    class AlignDevicesHook:
        pass

    layers_of(model).layers[1].mlp._hf_hook = AlignDevicesHook()
    return r"accelerate moves its weights around \(AlignDevicesHook\); call accelerate\.hooks"


@pytest.mark.parametrize("damage", [foreign_function, foreign_partial, offloaded])
def test_other_libraries(build, damage):
    model = build()
    refused(model, damage(model))
    report = apply(model, strict=False)
    assert any(
        "already replaced" in e.reason or "accelerate" in e.reason for e in report.left_alone
    )
    assert report.replaced


def test_class_replaced_by_another_library(build, monkeypatch):
    model = build()
    kind = type(layers_of(model).layers[0].mlp)

    def forward(self, x):
        return x

    forward.__module__ = "liger_kernel.transformers.swiglu"
    monkeypatch.setattr(kind, "forward", forward)
    refused(model, r"the forward of Qwen2MLP was already replaced, by liger_kernel")


def test_real_offloading_is_refused(build):
    hooks = pytest.importorskip("accelerate").big_modeling
    model = hooks.cpu_offload(build(), torch.device("cpu"))
    refused(model, "accelerate moves its weights around")


def test_model_without_storage(build):
    refused(build(device="meta"), "parameters are on meta; load the weights first")


def test_unsupported_types(build):
    refused(build(dtype=torch.float64), "parameters are torch.float64; load it in bfloat16")
    report = apply(build(dtype=torch.float64), strict=False)
    assert report.repaired
    assert not any("kernels" in e.by for e in report.replaced)


def test_quantised_weights(build):
    model = build()
    linear = layers_of(model).layers[0].mlp.up_proj

    class Linear8bit(nn.Linear):
        pass

    linear.__class__ = Linear8bit
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    refused(model, "parameters are torch.int8, so the model is quantised")
    report = apply(model, strict=False)
    assert any("Linear8bit has its own product" in e.reason for e in report.left_alone)
    assert "forward" not in vars(linear)


def test_data_parallel_is_refused(build):
    refused(nn.DataParallel(build()), "DistributedDataParallel")


def test_what_is_left_alone_has_a_reason(build):
    report = apply(build(dtype=torch.float16))
    assert len(report.left_alone) >= 4
    assert all(e.reason for e in report.entries)
    reasons = {e.target.split(" (")[0]: e.reason for e in report.left_alone}
    assert "must be all bfloat16 or all float32" in reasons["linear layers"]
    assert "triton" in reasons["RMSNorm"]


def test_own_engine_is_told_apart(checkpoint_dir):
    import ume_models

    with pytest.raises(PatchError, match="own engine"):
        apply(ume_models.load(checkpoint_dir))


def test_options_that_do_not_exist(build):
    model = build()
    with pytest.raises(TypeError, match="logit"):
        apply(model, logit=False)
    assert not any(isinstance(vars(m).get("forward"), InstanceForward) for m in model.modules())


def test_a_class_around_a_known_model_names_the_model(model):
    outer = torch.nn.Module()
    outer.base = model
    with pytest.raises(PatchError, match=r"pass model\.base"):
        apply(outer)
