"""The official adapter with its forward replaced: same numbers, same gradients, same way back."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ume_models.errors import PatchError
from ume_models.patching import adapter, recipes
from ume_models.patching.adapter import AdapterForward, Unfit, obstacle, transition
from ume_models.patching.changes import Change, commit, undo
from ume_models.patching.recipes import plan
from ume_models.patching.report import Entry
from ume_models.patching.versions import ORIGINAL

STANDINS = Path(__file__).parent / "standins" / "plume"
RECORDED = Path(__file__).parents[1] / "conformance" / "plume_tiny"
CASES = {k: v for k, v in json.loads((RECORDED / "ops.json").read_text()).items() if k[:3] == "moe"}
SOURCES = {
    "plume-eval": STANDINS / "VLM2Vec" / "src" / "model" / "latent_moe.py",
    "plume-train": STANDINS / "plume" / "train" / "latent_moe.py",
}
_numbers = count()
NAMES = {recipe.name: recipe.modules[0] for recipe in adapter.RECIPES}


def fresh(name: str, *edit: str) -> ModuleType:
    """A repository's module under a name of its own; no other test has this copy.

    With an edit (old text, new text) it is a fork of it.
    """
    spec = spec_from_file_location(f"adapter_standin_{next(_numbers)}", SOURCES[name])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # torch.compile and pickle look there
    if edit:
        source = SOURCES[name].read_text()
        assert edit[0] in source
        exec(compile(source.replace(*edit), module.__name__, "exec"), vars(module))
    else:
        spec.loader.exec_module(module)
    return module


def patched(name: str) -> tuple[ModuleType, list[Change]]:
    module = fresh(name)
    recipe = next(r for r in adapter.RECIPES if r.name == name)
    assert recipe.recognises(module)
    changes, _ = plan(recipe, module)
    commit(changes)
    return module, changes


@pytest.fixture(scope="module")
def ops() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "ops.safetensors")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per forward that the original did not have to compute."""
    calls: list[Any] = []
    inner = adapter.transition

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        calls.append(result)
        return result

    monkeypatch.setattr(adapter, "transition", counting)
    tried = recipes.tried

    def uncounted(*args: Any) -> str | None:
        before = len(calls)
        complaint = tried(*args)
        del calls[before:]
        return complaint

    monkeypatch.setattr(recipes, "tried", uncounted)
    return calls


def build(module: ModuleType, width: int = 32, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return module.LatentMoETransition(width, 4, 2, **options)


def run(model: nn.Module, z: torch.Tensor, step: Any, context: Any) -> dict[str, torch.Tensor]:
    """Outputs and every gradient, by name."""
    model.zero_grad()
    z = z.clone().requires_grad_()
    inputs = {"z": z}
    if context is not None:
        inputs["context"] = context = context.clone().requires_grad_()
    out, aux = model(z, step, context)
    assert set(aux) == {"balance_loss", "router_entropy"}
    goal = (out * torch.arange(out.shape[-1])).sum() + 3 * aux["balance_loss"]
    (goal + aux["router_entropy"] / 2).backward()
    found = {"out": out, **aux, **{f"d{name}": t.grad for name, t in inputs.items()}}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        size = float(value.abs().max()) or 1.0
        assert float((got[name] - value).abs().max()) <= 1e-5 * size, name


@pytest.mark.parametrize("repository", sorted(NAMES))
@pytest.mark.parametrize("case", sorted(CASES))
def test_recorded_outputs_of_the_official_module(repository, case, ops, used):
    shape = CASES[case]
    if shape["excluded"] and repository == "plume-train":
        pytest.skip("the training copy excludes no experts")
    excluded = {"excluded_expert_indices": shape["excluded"]} if shape["excluded"] else {}
    module, _ = patched(repository)
    model = module.LatentMoETransition(
        shape["D"], shape["num_experts"], shape["top_k"], shape["shared"], **excluded
    )
    prefix = f"{case}.param."
    model.load_state_dict({k[len(prefix) :]: v for k, v in ops.items() if k.startswith(prefix)})
    get = lambda name: ops[f"{case}.{name}"]  # noqa: E731
    z, context = get("z").clone().requires_grad_(), get("context").clone().requires_grad_()
    out, aux = model(z, get("step"), context)
    goal = (out * get("w")).sum() + 3 * aux["balance_loss"] + 0.5 * aux["router_entropy"]
    goal.backward()
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, get("y"), **near)
    for name in ("balance_loss", "router_entropy"):
        torch.testing.assert_close(aux[name].reshape(1), get(name), **near)
    torch.testing.assert_close(z.grad, get("dz"), **near)
    torch.testing.assert_close(context.grad, get("dcontext"), **near)
    for name, parameter in model.named_parameters():
        wanted = get(f"grad.{name}")
        got = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, wanted, **near, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(z, get("step"), context)[0], get("y"), **near)
    assert len(used) == 2


@pytest.mark.parametrize("repository", sorted(NAMES))
@pytest.mark.parametrize("step", [0, -3, 99, torch.tensor([2]), torch.tensor([-1, 40, 3, 3, 0])])
@pytest.mark.parametrize("shape", [None, (32,), (1, 32), (5, 32)])
def test_every_form_of_step_and_context(repository, step, shape, used):
    model = build(fresh(repository))
    twin, _ = patched(repository)
    other = build(twin)
    z = torch.randn(5, 32)
    context = None if shape is None else torch.randn(shape)
    same(run(other, z, step, context), run(model, z, step, context))
    same_inference(other, model, z, step, context)
    assert len(used) == 2


def same_inference(got: nn.Module, wanted: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got(*inputs), wanted(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"use_shared_expert": False}, {"step_embed_max_steps": 3}])
def test_constructor_options(options, used):
    model, other = (
        build(fresh("plume-train"), **options),
        build(patched("plume-train")[0], **options),
    )
    z = torch.randn(4, 32)
    same(run(other, z, 7, None), run(model, z, 7, None))
    assert len(used) == 1


def test_excluded_experts_get_nothing(used):
    options = {"excluded_expert_indices": (1, 2)}
    model = build(fresh("plume-eval"), **options)
    other = build(patched("plume-eval")[0], **options)
    z = torch.randn(6, 32)
    got = run(other, z, 1, z.flip(0))
    same(got, run(model, z, 1, z.flip(0)))
    assert "experts.0.fc1.weight" in got and "experts.1.fc1.weight" not in got
    assert len(used) == 1


def test_dropout_draws_as_the_original_does(used):
    model = build(fresh("plume-train"), expert_dropout=0.5)
    other = build(patched("plume-train")[0], expert_dropout=0.5)
    z = torch.randn(4, 32)
    for chosen in (model, other):
        torch.manual_seed(11)
        chosen.drawn = chosen(z, 2)[0]
    assert torch.equal(model.drawn, other.drawn)
    assert not used
    same_inference(other.eval(), model.eval(), z, 2)
    assert len(used) == 1


def test_half_precision_is_as_close_to_float32_as_the_original(used):
    exact = build(fresh("plume-eval"), 64).eval()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    model = copy.deepcopy(exact).bfloat16()
    other = build(patched("plume-eval")[0], 64).eval().bfloat16()
    other.load_state_dict(model.state_dict())
    z, context = torch.randn(2, 96, 64).bfloat16()
    with torch.no_grad():
        wanted, _ = exact(z.float(), 1, context.float())
        before, before_aux = model(z, 1, context)
        after, after_aux = other(z, 1, context)
    assert after.dtype is torch.bfloat16
    assert [a.dtype for a in after_aux.values()] == [a.dtype for a in before_aux.values()]
    errors = [float((got.float() - wanted).norm()) for got in (before, after)]
    assert 0 < errors[1] <= 2 * errors[0]
    assert len(used) == 1


def test_autocast(used):
    model, other = build(fresh("plume-eval")), build(patched("plume-eval")[0])
    z = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = other(z, 1), model(z, 1)
    assert not used  # products in another dtype than the parameters': the original's business
    assert torch.equal(got[0], wanted[0])
    model, other = model.bfloat16(), other.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got, wanted = other(z.bfloat16(), 1), model(z.bfloat16(), 1)
    assert len(used) == 1
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-2, atol=2e-2)
    assert got[1]["router_entropy"].dtype is torch.float32


class LowRank(nn.Module):
    """What PEFT puts around a layer, reduced to its core."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.a = nn.Parameter(torch.randn(layer.out_features, layer.in_features) / 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a.T


def wrapped(model: nn.Module) -> None:
    model.experts[2].fc1 = LowRank(model.experts[2].fc1)


def hooked(model: nn.Module) -> None:
    model.experts[0].fc2.register_forward_hook(lambda module, args, out: out * 2)


def replaced(model: nn.Module) -> None:
    model.ln.forward = lambda x: x


@pytest.mark.parametrize("change", [wrapped, hooked, replaced])
def test_what_the_kernels_cannot_see_runs_the_original(change, used):
    model, other = build(fresh("plume-train")), build(patched("plume-train")[0])
    for chosen in (model, other):
        torch.manual_seed(5)
        change(chosen)
    z = torch.randn(9, 32)
    same(run(other, z, 0, None), run(model, z, 0, None))
    assert not used
    assert obstacle(other) is not None
    assert obstacle(build(fresh("plume-train"))) is None


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3, 5), 0, None),
        (torch.zeros(3), 0, None),
        (torch.zeros(3, 32), torch.tensor([1, 2]), None),
        (torch.zeros(3, 32), 0, torch.zeros(2, 32)),
        (torch.zeros(3, 32, dtype=torch.bfloat16), 0, None),
    ],
)
def test_bad_input_raises_what_the_original_raises(arguments):
    model, other = build(fresh("plume-eval")), build(patched("plume-eval")[0])
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        model(*arguments)
    with pytest.raises(wanted.type) as got:
        other(*arguments)
    assert str(got.value) == str(wanted.value)
    with pytest.raises(Unfit):
        transition(model, *arguments)


def test_no_rows():
    model, other = build(fresh("plume-eval")), build(patched("plume-eval")[0])
    assert other(torch.zeros(0, 32), 0)[0].shape == model(torch.zeros(0, 32), 0)[0].shape


def test_compiled_module_keeps_its_graph():
    model, other = build(fresh("plume-eval")), build(patched("plume-eval")[0])
    z = torch.randn(3, 32)
    with torch.no_grad():
        got = torch.compile(other, backend="eager")(z, 1)
        torch.testing.assert_close(got, model(z, 1), rtol=1e-5, atol=1e-6)


def test_one_instance(used):
    module = fresh("plume-eval")
    model, twin = build(module).eval(), build(module).eval()
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    change = Change(model, "forward", AdapterForward(model), Entry("forward", "replaced"))
    commit([change])
    z = torch.randn(4, 32)
    same_inference(model, twin, z, 2)
    assert len(used) == 1  # of the twin's nothing changed
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.ln.bias.add_(1)
    assert not torch.allclose(copied(z, 2)[0], model(z, 2)[0])
    assert copied.forward.module is copied
    undo([change])
    assert "forward" not in vars(model)


def test_a_pickled_instance_stays_patched(used):
    module = fresh("plume-train")
    model = build(module).eval()
    commit([Change(model, "forward", AdapterForward(model), Entry("forward", "replaced"))])
    loaded = pickle.loads(pickle.dumps(model))
    same_inference(loaded, model, torch.randn(4, 32), 2)
    assert len(used) == 2


@pytest.mark.parametrize("repository", sorted(NAMES))
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("self.act(self.fc1(x))", "F.silu(self.fc1(x))", r"something else .*\(difference"),
        ("nn.GELU()", "nn.SiLU()", r"something else|another activation than the exact GELU"),
        ("nn.GELU()", 'nn.GELU("tanh")', r"something else|another activation than the exact GELU"),
        ("F.softmax", "2 * F.softmax", r"something else .*\(difference"),
        ("self.ln(z_t)", "z_t", r"something else .*\(difference"),
        ('"balance_loss": balance_loss', '"balance_loss": 4 * balance_loss', r"\(difference"),
        ('{"balance_loss"', '{"rows": 5, "balance_loss"', "it returns .rows, balance_loss, "),
        ("z_t + self._normalize_context(z_t, context)", "z_t", r"something else .*\(difference"),
        ("self.ln = ", "self.scale = self.gone; self.ln = ", "cannot be tried .*gone"),
    ],
)
def test_another_adapter_is_not_replaced(repository, old, new, complaint):
    try:
        module = fresh(repository, old, new)
    except AssertionError:
        pytest.skip("this copy words it otherwise")
    recipe = next(r for r in adapter.RECIPES if r.name == repository)
    with pytest.raises(PatchError, match=complaint):
        plan(recipe, module)
    changes, entries = plan(recipe, module, strict=False)
    assert not changes
    assert [entry.action for entry in entries] == ["left alone"]


def test_an_adapter_made_otherwise_is_not_tried():
    module = fresh("plume-train", "        hidden_size,\n", "        config, hidden_size,\n")
    assert len(plan(next(r for r in adapter.RECIPES if r.name == "plume-train"), module)[0]) == 1


@pytest.mark.parametrize("repository", sorted(NAMES))
def test_a_trial_leaves_no_trace(repository):
    module = fresh(repository)
    made: list[Any] = []
    init = module.LatentMoETransition.__init__

    def announcing(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(args)
        init(self, *args, **kwargs)

    vars(announcing)[ORIGINAL] = init
    module.LatentMoETransition.__init__ = announcing
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            changes, _ = plan(next(r for r in adapter.RECIPES if r.name == repository), module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(changes) == 1
    assert not made  # the first call of ours patches the script, which is not loaded yet
    assert torch.equal(torch.get_rng_state(), state)


def test_revert_restores_the_identical_function():
    for name in NAMES:
        module = fresh(name)
        original = module.LatentMoETransition.forward
        recipe = next(r for r in adapter.RECIPES if r.name == name)
        changes, _ = plan(recipe, module)
        commit(changes)
        assert module.LatentMoETransition.forward is not original
        undo(changes)
        assert module.LatentMoETransition.forward is original
