"""The adapter's Triton kernels in the interpreter: parity, gradients, tracing, bad input."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ume_kernels import MoETransition, dispatch, moe_transition, triton_backend
from ume_kernels.dispatch import Backend, BackendError, Obstacle
from ume_kernels.moe_transition import custom_ops, moe_transition_reference
from ume_kernels.moe_transition import op as moe_op
from ume_kernels.moe_transition.custom_ops import flat

pytest.importorskip("triton")
if not triton_backend.interpreting():
    pytest.skip("these run in Triton's interpreter; -m gpu has the others", allow_module_level=True)

pytestmark = pytest.mark.interpreted

RECORDED = Path(__file__).parents[1] / "conformance" / "plume_tiny"
CASES = {k: v for k, v in json.loads((RECORDED / "ops.json").read_text()).items() if k[:3] == "moe"}


@pytest.fixture(scope="module")
def tensors():
    return load_file(RECORDED / "ops.safetensors")


def build(case, tensors, name):
    module = MoETransition(
        case["D"],
        num_experts=case["num_experts"],
        top_k=case["top_k"],
        use_shared_expert=case["shared"],
        excluded_expert_indices=case["excluded"],
    )
    prefix = f"{name}.param."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state, strict=True)
    return module


def run(module, z, step, context, excluded=(), backend="triton", balance="batch"):
    mask = module.exclusion_mask(excluded)
    weights = module.weights()
    return moe_transition(
        z, context, step, weights, module.top_k, mask, backend=backend, balance=balance
    )


def gradients(module, function, z, context, w):
    """Output, both losses, and the gradients of z, context and every parameter."""
    module = copy.deepcopy(module)
    z = z.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    y, aux = function(module, z, context)
    objective = (y * w).sum() + 3 * aux["balance_loss"] + 0.5 * aux["router_entropy"]
    objective.backward()
    found = [y.detach(), aux["balance_loss"].detach(), aux["router_entropy"].detach(), z.grad]
    found.append(torch.zeros_like(z) if context is None else context.grad)
    for parameter in module.parameters():
        grad = parameter.grad
        found.append(torch.zeros_like(parameter) if grad is None else grad)
    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_forward_and_backward_equal_the_official_module(name, tensors):
    module = build(CASES[name], tensors, name)
    get = lambda key: tensors[f"{name}.{key}"]  # noqa: E731
    z, context = get("z").clone().requires_grad_(), get("context").clone().requires_grad_()
    y, aux = run(module, z, get("step"), context)
    objective = (y * get("w")).sum() + 3 * aux["balance_loss"] + 0.5 * aux["router_entropy"]
    objective.backward()
    torch.testing.assert_close(y, get("y"), rtol=0, atol=1e-5)
    for key in ("balance_loss", "router_entropy"):
        torch.testing.assert_close(aux[key].reshape(1), get(key), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.grad, get("dz"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(context.grad, get("dcontext"), rtol=1e-4, atol=1e-5)
    for key, parameter in module.named_parameters():
        expected = get(f"grad.{key}")
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["moe0", "moe1", "moe4", "moe5"])
def test_inference_equals_the_official_module(name, tensors):
    module = build(CASES[name], tensors, name).requires_grad_(False).pack_experts()
    y, aux = run(module, *(tensors[f"{name}.{key}"] for key in ("z", "step", "context")))
    torch.testing.assert_close(y, tensors[f"{name}.y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        aux["balance_loss"].reshape(1), tensors[f"{name}.balance_loss"], rtol=0, atol=1e-6
    )


@st.composite
def problems(draw, most_rows):
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(4, experts)))
    excluded = draw(st.integers(0, experts - top_k))
    torch.manual_seed(draw(st.integers(0, 1000)))
    rows = draw(st.one_of(st.integers(1, 4), st.integers(5, most_rows)))
    module = MoETransition(
        draw(st.sampled_from([16, 48, 80])), experts, top_k, draw(st.booleans()), 5
    )
    width = module.hidden_size
    # far from 0, as latent states are: a variance computed as E[x²] - E[x]² would show
    z = torch.randn(rows, width) + 3 * torch.randn(rows, 1)
    context = torch.randn(rows, width) if draw(st.booleans()) else None
    step = draw(
        st.sampled_from(
            [2, 9, torch.tensor([1]), torch.randint(-2, 9, (rows,)), torch.full((rows,), 4).int()]
        )
    )
    return module, z, context, step, tuple(range(excluded))


@settings(max_examples=settings.default.max_examples // 5)
@given(problem=problems(18), balance=st.sampled_from(["batch", "sample"]))
def test_any_shape_equals_the_reference(problem, balance):
    module, z, context, step, excluded = problem
    module.requires_grad_(False)
    y, aux = run(module, z, step, context, excluded, balance=balance)
    mask = module.exclusion_mask(excluded)
    expected, losses = moe_transition_reference(
        z, context, step, module.weights(), module.top_k, mask, balance
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for key, loss in losses.items():
        torch.testing.assert_close(aux[key], loss, rtol=1e-5, atol=1e-6)


@settings(max_examples=settings.default.max_examples // 15)
@given(problem=problems(9), balance=st.sampled_from(["batch", "sample"]))
def test_any_gradient_equals_the_reference(problem, balance):
    module, z, context, step, excluded = problem
    w = torch.randn_like(z)

    def both(backend):
        return gradients(
            module,
            lambda m, a, c: run(m, a, step, c, excluded, backend, balance),
            z,
            context,
            w,
        )

    names = ["y", "balance", "entropy", "z", "context", *dict(module.named_parameters())]
    for name, got, expected in zip(names, both("triton"), both("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_float16_stays_within_twice_the_reference_error(rows):
    torch.manual_seed(rows)
    module = MoETransition(80).requires_grad_(False).half()
    wide = copy.deepcopy(module).float()
    z, context = torch.randn(2, rows, 80, dtype=torch.half).unbind(0)
    truth, _ = run(wide, z.float(), 3, context.float(), backend="torch")
    eager, _ = moe_transition_reference(z, context, 3, module.weights(), 2)
    fast, _ = run(module, z, 3, context)
    error = (eager.float() - truth).abs().max()
    assert 0 < error < 0.02
    assert (fast.float() - truth).abs().max() <= 2 * error


@pytest.mark.parametrize("rows", [1, 4, 5, 17])
def test_float16_gradients_stay_near_those_of_float32(rows):
    torch.manual_seed(rows)
    module = MoETransition(48).half()
    z, context, w = torch.randn(3, rows, 48, dtype=torch.half).unbind(0)
    wide = copy.deepcopy(module).float()
    truth = gradients(wide, lambda m, a, c: run(m, a, 1, c), z.float(), context.float(), w.float())
    eager = gradients(module, lambda m, a, c: run(m, a, 1, c, backend="torch"), z, context, w)
    fast = gradients(module, lambda m, a, c: run(m, a, 1, c), z, context, w)
    for got, theirs, right in zip(fast, eager, truth, strict=True):
        allowed = 2 * (theirs.float() - right).abs().max() + 1e-3 * right.abs().max()
        assert (got.float() - right).abs().max() <= allowed


@pytest.mark.parametrize("rows", [2, 6])
def test_experts_that_no_row_chose_get_exactly_no_gradient(rows):
    torch.manual_seed(0)
    module = MoETransition(32, 6, 1, excluded_expert_indices=[0, 2, 3, 4, 5])
    y, _ = run(module, torch.randn(rows, 32), 0, None)
    y.sum().backward()
    assert module.experts[1].fc1.weight.grad.abs().sum() > 0
    for number in (0, 2, 3, 4, 5):
        for parameter in module.experts[number].parameters():
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_what_an_unchosen_expert_holds_does_not_matter(rows):
    torch.manual_seed(0)
    module = MoETransition(32, 4, 2)
    z = torch.randn(rows, 32)
    right = gradients(module, lambda m, a, c: run(m, a, 0, c, (1,)), z, z, z)
    for parameter in module.experts[1].parameters():
        parameter.data.fill_(torch.nan)
    got = gradients(module, lambda m, a, c: run(m, a, 0, c, (1,)), z, z, z)
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_still_pass_gradients_to_the_inputs():
    torch.manual_seed(0)
    module = MoETransition(32).requires_grad_(False)
    z = torch.randn(6, 32)
    right = gradients(module, lambda m, a, c: run(m, a, 0, c, backend="torch"), z, z, z)
    got = gradients(module, lambda m, a, c: run(m, a, 0, c), z, z, z)
    torch.testing.assert_close(got[3:5], right[3:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_may_be_strided_and_context_broadcast(rows):
    torch.manual_seed(0)
    module = MoETransition(48).requires_grad_(False)
    z = torch.randn(rows, 3, 48)[:, -1]
    context = torch.randn(1, 48).expand(rows, -1)
    got, _ = run(module, z, 0, context)
    expected, _ = run(module, z.contiguous(), 0, context.contiguous(), backend="torch")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    columns = torch.randn(48, rows).T
    got, _ = run(module, columns, 0, None)
    torch.testing.assert_close(
        got, run(module, columns, 0, None, backend="torch")[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rows", [3, 6])
def test_step_and_exclusion_may_be_strided_or_broadcast(rows):
    torch.manual_seed(0)
    module = MoETransition(16, 4, 2, step_embed_max_steps=12)
    z, w = torch.randn(2, rows, 16).unbind(0)
    mask = torch.tensor([False, False, True, True, False, False, True, False])[::2]
    for step, excluded in [
        (torch.arange(2 * rows)[::2], mask),
        (torch.tensor([5]).expand(rows), torch.zeros(1).bool().expand(4)),
        (torch.arange(11).int()[1::9][:1], None),
    ]:
        assert step.numel() == 1 or not step.is_contiguous()

        def both(backend, step=step, excluded=excluded):
            def call(m, a, c):
                return moe_transition(a, c, step, m.weights(), 2, excluded, backend=backend)

            return gradients(module, call, z, None, w)

        for got, expected in zip(both("triton"), both("torch"), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [2, 5])
def test_ties_between_experts_go_to_the_lowest_index(rows):
    torch.manual_seed(0)
    module = MoETransition(16, 4, 2)
    for parameter in module.router.parameters():
        parameter.data.zero_()
    z, w = torch.randn(2, rows, 16).unbind(0)
    right = gradients(module, lambda m, a, c: run(m, a, 0, c, backend="torch"), z, None, w)
    got = gradients(module, lambda m, a, c: run(m, a, 0, c), z, None, w)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    module = MoETransition(32, 5, 3)
    z, context, w = torch.randn(3, 9, 32).unbind(0)
    first, second = (
        gradients(module, lambda m, a, c: run(m, a, 0, c), z, context, w) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_the_others_in_its_batch():
    torch.manual_seed(0)
    module = MoETransition(48).requires_grad_(False)
    z = torch.randn(12, 48)
    whole, _ = run(module, z, 0, None)
    noise = torch.cat([z[:7], 100 * torch.randn(9, 48)])
    torch.testing.assert_close(run(module, noise, 0, None)[0][:7], whole[:7], rtol=0, atol=0)


def test_no_rows():
    module = MoETransition(32).requires_grad_(False)
    assert run(module, torch.zeros(0, 32), 0, None)[0].shape == (0, 32)


# ------------------------------------------------------------------------ packing, tracing


def test_packed_experts_are_views_of_one_storage_and_stay_true():
    torch.manual_seed(0)
    module = MoETransition(32)
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    module.pack_experts()
    stacked = module.requires_grad_(False).weights().stacked()
    assert stacked.fc1_weight.data_ptr() == module.experts[0].fc1.weight.data_ptr()
    assert module.state_dict().keys() == kept.keys()
    assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
    assert all(parameters[k] is p for k, p in module.named_parameters())
    z = torch.randn(2, 32)
    for change in ("load", "replace", "convert"):
        if change == "load":
            module.load_state_dict({k: v + 0.01 for k, v in kept.items()})
        elif change == "replace":
            module.experts[2].fc1.weight = torch.nn.Parameter(torch.randn(64, 32), False)
        else:
            module.double().float()
            again = module.weights().stacked()
            assert again.fc1_weight.data_ptr() == module.experts[0].fc1.weight.data_ptr()
        torch.testing.assert_close(
            run(module, z, 0, None)[0], run(module, z, 0, None, backend="torch")[0]
        )


def test_stacking_is_differentiable_while_training():
    module = MoETransition(16)
    module.weights().stacked().fc2_weight[1].sum().backward()
    assert torch.equal(module.experts[1].fc2.weight.grad, torch.ones(16, 32))


def arguments(module, z, context, step):
    return (z, context, step, 0, None, module.top_k, False, True, *flat(module.weights()))


@pytest.mark.parametrize("rows", [2, 6])
def test_the_ops_keep_what_they_promise_to_torch_library(rows):
    torch.manual_seed(0)
    module = MoETransition(16, 3)
    z, context = torch.randn(2, rows, 16).unbind(0)
    step = torch.zeros(rows, dtype=torch.long)
    frozen = copy.deepcopy(module).requires_grad_(False)
    torch.library.opcheck(custom_ops._inference, arguments(frozen, z, context, step))
    args = arguments(module, z.requires_grad_(), context, step)
    torch.library.opcheck(custom_ops._training, args)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_passes_over_it(compiler):
    torch.manual_seed(0)
    module = MoETransition(16)
    w = torch.randn(5, 16)
    step = torch.arange(5)

    def plain(m, z, c):
        return run(m, z + 1, step, c)

    compiled = torch.compile(plain, fullgraph=True, backend=compiler)
    z, context = torch.randn(2, 5, 16).unbind(0)
    right = gradients(module, plain, z, context, w)
    got = gradients(module, compiled, z, context, w)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_export_passes_over_it():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter = MoETransition(16).requires_grad_(False)

        def forward(self, z, step):
            return run(self.adapter, z, step, None)[0]

    torch.manual_seed(0)
    module = Wrapped().eval()
    z, step = torch.randn(3, 16), torch.tensor([1])
    program = torch.export.export(module, (z, step))
    assert any("moe_transition" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(z, step), module(z, step))


# ----------------------------------------------------------------- choice and bad input


def test_the_interpreter_runs_only_when_asked(monkeypatch):
    z = torch.zeros(2, 32)
    monkeypatch.delenv("UME_BACKEND", raising=False)
    assert dispatch.select("moe_transition", z) is Backend.COMPOSED
    monkeypatch.setenv("UME_BACKEND", "moe_transition:triton")
    assert dispatch.select("moe_transition", z) is Backend.TRITON
    called = []
    monkeypatch.setattr(moe_op, "moe_transition_composed", lambda *a: called.append(a))
    MoETransition(32).requires_grad_(False)(z, 0)
    assert not called


@pytest.mark.parametrize("training", [False, True])
def test_a_failed_compilation_falls_back_once_with_a_warning(monkeypatch, training):
    from triton.compiler.errors import CompilationError

    from ume_kernels.moe_transition import triton_kernels

    def broken(*args, **kwargs):
        raise CompilationError("x", None, "no such instruction")

    monkeypatch.setattr(triton_kernels, "forward", broken)
    monkeypatch.setattr(triton_backend, "_broken", {})
    monkeypatch.setattr(
        triton_backend,
        "check",
        lambda name, given: Obstacle("broken") if name in triton_backend._broken else None,
    )
    monkeypatch.delenv("UME_BACKEND", raising=False)
    torch.manual_seed(0)
    module = MoETransition(32).requires_grad_(training)
    z, w = torch.randn(2, 3, 32).unbind(0)
    step = torch.tensor([0])
    op = custom_ops._training if training else custom_ops._inference
    call = lambda m, a, c: op(a, c, step, 0, None, 2, False, False, *flat(m.weights()))  # noqa: E731

    def through(m, a, c):
        out, aux, *_ = call(m, a, c)
        return out, {"balance_loss": aux[0], "router_entropy": aux[1]}

    if training:
        right = gradients(module, lambda m, a, c: run(m, a, 0, c, backend="torch"), z, z, w)
        with pytest.warns(RuntimeWarning, match="do not compile here"):
            got = gradients(module, through, z, z, w)
        for a, b in zip(got, right, strict=True):
            torch.testing.assert_close(a, b)
    else:
        with pytest.warns(RuntimeWarning, match="do not compile here"):
            got = call(module, z, z)[0]
        torch.testing.assert_close(got, run(module, z, 0, z, backend="torch")[0])
    monkeypatch.setattr(triton_backend, "_broken", {})
    with pytest.raises(BackendError, match="do not compile"):
        run(module, z, 0, z)


def test_bad_input_is_named():
    module = MoETransition(32).requires_grad_(False)
    weights = module.weights()
    z = torch.randn(2, 32)
    cpu_mask = torch.tensor([True, True, True, False])

    def call(z=z, context=None, step=0, top_k=2, excluded=None, weights=weights, **options):
        return moe_transition(
            z, context, step, weights, top_k, excluded, backend="triton", **options
        )

    for options, message in [
        ({"z": z[0]}, r"z must be \[B, 32\]"),
        ({"z": torch.randn(2, 16)}, r"z must be \[B, 32\]"),
        ({"z": z.half()}, "a weight is torch.float32, z torch.float16"),
        ({"context": z.half()}, "context is torch.float16, z torch.float32"),
        ({"context": torch.randn(3, 32)}, "context must be"),
        ({"context": z.to("meta")}, "context is on meta, z on cpu"),
        ({"excluded": cpu_mask.to("meta")}, "excluded is on meta, z on cpu"),
        ({"step": torch.zeros(1, dtype=torch.long, device="meta")}, "step is on meta"),
        ({"step": torch.zeros(3, dtype=torch.long)}, "step has 3 elements"),
        ({"step": torch.zeros(2)}, "step must be int32 or int64"),
        ({"step": -1}, "step must be 0 or more .*, got -1"),
        ({"step": 2**63}, "step must be 0 or more and fit int64"),
        ({"step": 1.5}, "step must be an int or an integer tensor, got 1.5"),
        ({"step": True}, "step must be an int or an integer tensor, got True"),
        ({"top_k": True}, "top_k must be 1 … 4, an int, got True"),
        ({"top_k": 2.0}, "top_k must be 1 … 4, an int, got 2.0"),
        ({"excluded": [0]}, "excluded must be a bool mask .*, got a list; .*exclusion_mask"),
        ({"weights": replace(weights, fc2_bias=weights.fc2_bias[:3])}, "fc2_bias has 3 experts"),
        ({"top_k": 0}, "top_k must be 1 … 4"),
        ({"top_k": 5}, "top_k must be 1 … 4"),
        ({"excluded": torch.zeros(3, dtype=torch.bool)}, r"excluded must be a bool mask \[4\]"),
        ({"excluded": torch.zeros(4)}, r"excluded must be a bool mask \[4\]"),
        ({"excluded": cpu_mask}, "excluded leaves 1 experts"),
        ({"excluded": torch.ones(4, dtype=torch.bool)}, "excluded leaves 0 experts"),
        ({"balance": "row"}, "balance must be"),
        ({"weights": copy.deepcopy(module).double().weights()}, "a weight is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**options)


@pytest.mark.parametrize(
    ("width", "experts", "message"),
    [(24, 4, "multiple of 16, not 24"), (32, 17, "at most 16 experts, not 17")],
)
def test_shapes_without_a_kernel_run_in_pytorch_or_say_so(width, experts, message):
    module = MoETransition(width, experts).requires_grad_(False)
    z = torch.randn(2, width)
    with pytest.raises(BackendError, match=message):
        run(module, z, 0, None)
    assert run(module, z, 0, None, backend=None)[0].shape == z.shape
