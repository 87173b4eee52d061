"""What wraps, replaces or hooks a layer of a model is noticed; what only changes values is not."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm

from ume_kernels import MoETransition
from ume_models.backbone.config import parse_config
from ume_models.backbone.structure import Structure
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.errors import StructureError

TARGETS = ["q_proj", "v_proj", "qkv", "router"]
PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def model(checkpoint_dir: Path) -> Any:
    config = parse_config(json.loads((checkpoint_dir / "config.json").read_text()))
    torch.manual_seed(0)
    made: Any = PlumeForEmbedding(config, MoETransition(128), tied=True)
    made._structure = Structure(made)
    made._structure.check(made)
    return made


def refused(model: Any, *words: str) -> None:
    with pytest.raises(StructureError) as raised:
        model._structure.check(model)
    assert all(word in str(raised.value) for word in words), raised.value


def adapt(model: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def test_an_adapter_is_refused_until_it_is_merged(model):
    adapted = adapt(model)
    refused(model, "model.layers.0.self_attn.q_proj", "merge_and_unload")
    x = torch.randn(3, 128)
    wanted = model.model.layers[1].self_attn.q_proj(x)
    merged = adapted.merge_and_unload()
    assert merged is model
    model._structure.check(model)
    weights = model.model.layers[1].weights()
    torch.testing.assert_close(F.linear(x, weights.q_weight, weights.q_bias), wanted)


def test_an_adapter_is_refused_in_copies_too(model):
    adapt(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        refused(twin, "merge_and_unload")


def hook(model: Any) -> Any:
    return model.get_submodule(PATH).register_forward_hook(lambda m, args, out: out * 0)


def pre_hook(model: Any) -> Any:
    return model.model.layers[1].register_forward_pre_hook(lambda m, args: None)


def root_hook(model: Any) -> Any:
    return model.register_forward_hook(lambda m, args, out: None)


def global_hook(model: Any) -> Any:
    return torch_modules.register_module_forward_hook(lambda m, args, out: None)


def global_pre_hook(model: Any) -> Any:
    return torch_modules.register_module_forward_pre_hook(lambda m, args: None)


@pytest.mark.parametrize("register", [hook, pre_hook, root_hook, global_hook, global_pre_hook])
def test_a_hook_is_refused_until_it_is_removed(model, register):
    handle = register(model)
    try:
        refused(model, "hook")
        refused(copy.deepcopy(model), "hook")
    finally:
        handle.remove()
    model._structure.check(model)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def written_past_setattr(model: Any) -> None:
    # as the quantisers of transformers replace layers
    model.model.layers[1].self_attn._modules["q_proj"] = Scaled(128, 128)


def bias_added(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(128))


def weight_not_a_parameter(model: Any) -> None:
    layer = model.get_submodule(PATH)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


CHANGES: dict[str, Callable[[Any], Any]] = {
    "child": lambda m: m.set_submodule(PATH, Scaled(128, 128)),
    "child in the table": written_past_setattr,
    "layer in the list": lambda m: m.model.layers.insert(1, Scaled(1, 1)),
    "layer taken out": lambda m: m.model.layers.pop(0),
    "layer added": lambda m: m.model.layers.append(copy.deepcopy(m.model.layers[0])),
    "class": lambda m: setattr(m.get_submodule(PATH), "__class__", Scaled),
    "class of the root": lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
    "forward": lambda m: setattr(m.get_submodule(PATH), "forward", lambda x: x),
    "forward of the root": lambda m: setattr(m, "forward", lambda x: x),
    "submodule of the root": lambda m: m.add_module("extra", nn.Linear(1, 1)),
    "submodule of a leaf": lambda m: m.get_submodule(PATH).add_module("extra", nn.Linear(1, 1)),
    "submodule gone": lambda m: delattr(m.visual, "merger"),
    "adapter gone": lambda m: setattr(m, "latent_moe_transition", None),
    "bias": bias_added,
    "parameter": lambda m: m.model.register_parameter("p", nn.Parameter(torch.ones(1))),
    "not a parameter": weight_not_a_parameter,
    "parametrize": lambda m: parametrizations.orthogonal(m.get_submodule(PATH)),
    "weight_norm": lambda m: weight_norm(m.visual.blocks[0].attn.proj),
    "spectral_norm": lambda m: spectral_norm(m.latent_moe_transition.router),
    "prune": lambda m: prune.l1_unstructured(m.get_submodule(PATH), "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_the_engine_would_not_see_is_refused(model, change):
    CHANGES[change](model)
    refused(model)


def test_parametrization_made_permanent_is_read(model):
    layer = model.get_submodule(PATH)
    parametrizations.orthogonal(layer)
    refused(model, PATH)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model._structure.check(model)


def test_values_are_no_part_of_it(model):
    layer = model.get_submodule(PATH)
    layer.weight = nn.Parameter(layer.weight * 2)
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    layer.register_full_backward_hook(print)
    layer.compile()
    model.half().to(torch.float32).eval().requires_grad_(False)
    model._structure.check(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin._structure.check(twin)
        hook(twin)
        refused(twin, PATH)
    model._structure.check(model)


def test_the_record_does_not_keep_the_model(model, request):
    model = copy.deepcopy(model)
    model._structure.check(model)
    gone = weakref.ref(model)
    gc.disable()
    request.addfinalizer(gc.enable)
    del model
    assert gone() is None
