"""A patched model computes what it computed before, with and without gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from ume_models.patching import apply, revert
from ume_models.patching.changes import InstanceForward

pytestmark = pytest.mark.compat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def states(model, inputs):
    """All hidden states and the logits."""
    out = model(**inputs, output_hidden_states=True)
    return [*out.hidden_states, out.logits]


def gradients(model, inputs):
    model.zero_grad()
    states(model, inputs)[-1].float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, relative=1e-5):
    """Equal to rounding, measured against the largest gradient of all."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= relative * largest, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_float32_is_the_same_to_rounding(build, inputs, family, attention):
    model = build(family, attention)
    with torch.no_grad():
        expected = states(model, inputs)
        apply(model)
        found = states(model, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_float32_as_before(build, inputs, dtype):
    model = build()
    with torch.no_grad():
        exact = states(model, inputs)
        model.to(dtype)
        before = states(model, inputs)
        apply(model)
        after = states(model, inputs)
    for truth, old, new in zip(exact, before, after, strict=True):
        error = (old.float() - truth).abs().max()
        assert (new.float() - truth).abs().max() <= 2 * error + 1e-6


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_same(build, inputs, dtype, mode):
    model = build(dtype=dtype).train(mode)
    expected = gradients(model, inputs)
    apply(model)
    # the patch embedding sums in another order
    relative = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same_gradients(gradients(model, inputs), expected, relative)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, inputs, reentrant):
    model.train()
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    expected = gradients(model, inputs)
    apply(model)
    assert_same_gradients(gradients(model, inputs), expected)


def test_autocast(build, inputs):
    model = build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = states(model, inputs)
        apply(model)
        found = states(model, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs)


def test_large_products_are_written_over_the_gate(build, monkeypatch):
    """At sizes where memory counts the fused product runs; with gradients it does not."""
    from ume_models.patching import forwards

    monkeypatch.setattr(forwards, "WORTH_REUSING", 0)
    calls = []
    kept = forwards.silu_mul_
    monkeypatch.setattr(forwards, "silu_mul_", lambda g, u: calls.append(g) or kept(g, u))
    model = build()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apply(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert len(calls) == 2
    model(input_ids=ids).logits.sum().backward()
    assert len(calls) == 2
    seen = []
    first = next(m for m in model.modules() if type(m).__name__ == "Qwen2MLP")
    first.gate_proj.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    with torch.no_grad():
        model(input_ids=ids)
        assert len(calls) == 3  # not over what a hook may have kept
        entered, left = seen[0]
        torch.testing.assert_close(left, entered @ first.gate_proj.weight.T)


def test_generate(model, inputs):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    apply(model)
    assert model.generate(**inputs, **options).equal(expected)


def test_without_logits_the_hidden_states_are_the_same(model, inputs):
    with torch.no_grad():
        expected = states(model, inputs)
        report = apply(model, logits=False)
        found = states(model, inputs)
    assert found[-1].shape == (2, 14, 0)
    for mine, theirs in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert [e.by for e in report.replaced if e.target == "lm_head"] == ["no product"]
    revert(report)
    assert model(**inputs).logits.shape == (2, 14, 120)


def test_signatures_stay(model):
    before = {name: inspect.signature(m.forward) for name, m in model.named_modules()}
    apply(model, logits=False)
    for name, module in model.named_modules():
        assert inspect.signature(module.forward) == before[name], name


def test_only_this_instance_changes(build, inputs):
    model, other = build(), build()
    classes = {type(m): dict(vars(type(m))) for m in model.modules()}
    keys = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    report = apply(model)
    assert report.replaced
    assert report.repaired
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert all(dict(vars(kind)) == held for kind, held in classes.items())
    assert not any("forward" in vars(m) for m in other.modules())
    revert(report)
    assert not any("forward" in vars(m) for m in model.modules())


def test_checkpoints_fit_both_ways(build, inputs, tmp_path):
    patched, plain = build(seed=0), build(seed=1)
    apply(patched)
    patched.save_pretrained(tmp_path / "patched")
    loaded = type(plain).from_pretrained(tmp_path / "patched", attn_implementation="sdpa").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, patched(**inputs).logits)
        patched.load_state_dict(plain.state_dict())
        torch.testing.assert_close(
            patched(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_without_gradients_are_native(build, monkeypatch, dtype):
    from ume_kernels.dispatch import Backend, explain
    from ume_models.patching import forwards

    x = torch.empty(1, 8, dtype=dtype)
    if explain("linear", x, x.expand(8, 8).clone(), None).backend is not Backend.NATIVE:
        pytest.skip("the native kernel is not built here")
    calls = []
    kept = forwards.linear
    monkeypatch.setattr(forwards, "linear", lambda *a: calls.append(a[0]) or kept(*a))
    model = build(dtype=dtype)
    report = apply(model)
    targets = {e.target for e in report.replaced if "linear" in e.by}
    assert any(t.endswith("layers.*.mlp.gate_proj (2)") for t in targets)
    assert "lm_head" in targets
    with torch.no_grad():
        model(input_ids=torch.arange(3, 7)[None])
    assert len(calls) == 15
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert model.lm_head(torch.zeros(1, 32, dtype=dtype)).dtype is torch.float16
    assert len(calls) == 15


def test_kernels_of_the_gpu_give_the_same_numbers(build, monkeypatch):
    """In Triton's interpreter: norms and gated products where they would be replaced."""
    pytest.importorskip("triton")
    from ume_models.patching import forwards

    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here; tests/gpu runs them")
    monkeypatch.setattr(forwards, "WORTH_REUSING", 0)
    model = build("qwen2_5_vl")
    ids = torch.arange(3, 7)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        monkeypatch.setenv("UME_BACKEND", "rms_norm:triton,silu_mul:triton")
        report = apply(model)
        by = {e.target: e.by for e in report.replaced}
        assert by["model.language_model.norm"] == "ume_kernels.prefill.rms_norm (triton)"
        assert by["model.language_model.layers.*.mlp (2)"].endswith("(triton)")
        calls = []
        for name in ("rms_norm", "silu_mul_"):
            kept = getattr(forwards, name)
            spy = lambda *a, kept=kept: calls.append(kept) or kept(*a)  # noqa: E731
            monkeypatch.setattr(forwards, name, spy)
        found = model(input_ids=ids).logits
    assert len(calls) == 5 + 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.delenv("UME_BACKEND")
        model(input_ids=ids).logits.sum().backward()  # gradients: the original
    assert len(calls) == 5 + 2


def test_module_moved_to_another_type_runs_the_original(build, inputs):
    model = build(dtype=torch.bfloat16)
    apply(model)
    model.float()
    plain = build().bfloat16().float()
    with torch.no_grad():
        for mine, theirs in zip(states(model, inputs), states(plain, inputs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_tracers_see_every_product(build):
    """What counts or transforms operations one by one must not lose any to a kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(dtype=torch.bfloat16)
    ids = torch.arange(3, 7)[None]

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        return counter.get_total_flops()

    expected = count()
    apply(model)
    assert count() == expected
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert isinstance(vars(layer)["forward"], InstanceForward)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, (torch.ones_like(x) @ layer.weight.T))
        mapped = torch.func.vmap(layer)(x)
        torch.testing.assert_close(mapped, layer(x))
