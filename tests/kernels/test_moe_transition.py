"""The adapter against recorded outputs of the official module, forward and backward."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.utils import prune

from ume_kernels import MoETransition, moe_transition
from ume_kernels.dispatch import BackendError
from ume_kernels.moe_transition import moe_transition_reference
from ume_kernels.moe_transition.reference import route

RECORDED = Path(__file__).parents[1] / "conformance" / "plume_tiny"
CASES = {k: v for k, v in json.loads((RECORDED / "ops.json").read_text()).items() if k[:3] == "moe"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "ops.safetensors")


def build(case: dict, tensors: dict[str, torch.Tensor], name: str) -> MoETransition:
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


@pytest.mark.parametrize("name", sorted(CASES))
def test_forward_and_backward_equal_the_official_module(name, tensors):
    module = build(CASES[name], tensors, name)
    get = lambda key: tensors[f"{name}.{key}"]  # noqa: E731
    z, context = get("z").clone().requires_grad_(), get("context").clone().requires_grad_()
    y, aux = module(z, get("step"), context)
    objective = (y * get("w")).sum() + 3 * aux["balance_loss"] + 0.5 * aux["router_entropy"]
    objective.backward()
    torch.testing.assert_close(y, get("y"), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        aux["balance_loss"].reshape(1), get("balance_loss"), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        aux["router_entropy"].reshape(1), get("router_entropy"), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(z.grad, get("dz"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(context.grad, get("dcontext"), rtol=1e-4, atol=1e-5)
    for key, parameter in module.named_parameters():
        expected = get(f"grad.{key}")
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", sorted(CASES))
def test_inference_path_equals_the_official_module(name, tensors):
    module = build(CASES[name], tensors, name).eval().requires_grad_(False)
    y, aux = module(tensors[f"{name}.z"], tensors[f"{name}.step"], tensors[f"{name}.context"])
    torch.testing.assert_close(y, tensors[f"{name}.y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        aux["balance_loss"].reshape(1), tensors[f"{name}.balance_loss"], rtol=0, atol=1e-6
    )


def plain_loop(module: MoETransition, z, context, step, excluded):
    """Equation 4-5 row by row, written out."""
    rows = []
    for row in range(z.shape[0]):
        k = min(max(int(step[row]), 0), module.step_embed_max_steps - 1)
        joined = torch.cat([z[row] + context[row], module.step_embed.weight[k]])
        logits = module.router.weight @ joined + module.router.bias
        logits[list(excluded)] = -torch.inf
        p = torch.exp(logits - logits.max())
        p = p / p.sum()
        order = sorted(range(len(p)), key=lambda e: (-float(p[e]), e))[: module.top_k]
        u = (z[row] - z[row].mean()) / torch.sqrt(z[row].var(unbiased=False) + 1e-5)
        u = u * module.ln.weight + module.ln.bias
        out = z[row].clone()
        for number, expert in enumerate([*module.experts, module.shared_expert]):
            if expert is None or (number < module.num_experts and number not in order):
                continue
            h = expert.fc1.weight @ u + expert.fc1.bias
            h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
            weight = p[number] if number < module.num_experts else 1.0
            out = out + weight * (expert.fc2.weight @ h + expert.fc2.bias)
        rows.append(out)
    return torch.stack(rows)


@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([16, 48, 80]),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_a_plain_loop(rows, width, experts, top_k, shared, seed):
    torch.manual_seed(seed)
    module = MoETransition(width, experts, top_k, use_shared_expert=shared).double()
    module.requires_grad_(False)
    z, context = torch.randn(2, rows, width, dtype=torch.double).unbind(0)
    step = torch.randint(-2, 40, (rows,))
    excluded = (0,) if experts > module.top_k else ()
    expected = plain_loop(module, z, context, step, excluded)
    for run in (moe_transition, moe_transition_reference):
        got, _ = run(
            z, context, step, module.weights(), module.top_k, module.exclusion_mask(excluded)
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_bfloat16_stays_within_twice_the_reference_error():
    torch.manual_seed(0)
    module = MoETransition(256).requires_grad_(False)
    wide = MoETransition(256).requires_grad_(False)
    narrow = module.to(torch.bfloat16)
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    z, context = torch.randn(2, 16, 256, dtype=torch.bfloat16).unbind(0)
    truth, _ = moe_transition_reference(z.float(), context.float(), 3, wide.weights(), 2)
    fast, _ = moe_transition(z, context, 3, narrow.weights(), 2)
    eager, _ = moe_transition_reference(z, context, 3, narrow.weights(), 2)
    error = (eager.float() - truth).abs().max()
    assert 0 < error < 0.1
    assert (fast.float() - truth).abs().max() <= 2 * error


def test_dropout_acts_only_while_training():
    torch.manual_seed(0)
    module = MoETransition(32, dropout=0.5)
    z = torch.randn(4, 32)
    a, b = module(z, 0)[0], module(z, 0)[0]
    assert not torch.equal(a, b)
    module.eval()
    assert torch.equal(module(z, 0)[0], module(z, 0)[0])


def test_wrong_arguments_are_named():
    module = MoETransition(32)
    with pytest.raises(ValueError, match=r"z must be \[B, 32\]"):
        module(torch.randn(2, 16), 0)
    with pytest.raises(ValueError, match="context must be"):
        moe_transition(torch.randn(2, 32), torch.randn(3, 32), 0, module.weights(), 2)
    with pytest.raises(ValueError, match="step has 3 elements"):
        module(torch.randn(2, 32), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="leaves 1"):
        MoETransition(32, excluded_expert_indices=[0, 1, 2])
    with pytest.raises(ValueError, match="cannot exclude"):
        module.exclusion_mask([7])
    training = MoETransition(32, dropout=0.5)
    for step, message in [(-1, "step must be 0"), (torch.zeros(2), "step must be int32")]:
        with pytest.raises(ValueError, match=message):
            training(torch.randn(2, 32), step)
    with pytest.raises(ValueError, match="balance must be"):
        training(torch.randn(2, 32), 0, balance="row")
    with pytest.raises(ValueError, match=r"z must be \[B, 32\]"):
        training(torch.randn(2, 16), 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_exclusions_of_constructor_and_call_count_together(device):
    module = MoETransition(16, excluded_expert_indices=[0]).to(device)
    with pytest.raises(ValueError, match=r"excluding experts \[0, 1, 2\] leaves 1"):
        module.exclusion_mask([1, 2])
    assert module.exclusion_mask([0, 3]).device.type == device
    kept = MoETransition(16, excluded_expert_indices=[0]).exclusion_mask([0, 3])
    assert kept.tolist() == [True, False, False, True]


def test_weights_of_a_wrong_shape_are_named():
    module = MoETransition(16, 3).requires_grad_(False)
    listed = module.weights()
    z = torch.randn(2, 16)

    def call(weights):
        return moe_transition(z, None, 0, weights, 2)

    for weights in (listed, listed.stacked()):
        call(weights)
        for name in ("ln_weight", "ln_bias", "step_embed", "router_weight"):
            right = getattr(weights, name)
            for wrong in (right[..., :-1], right[..., None]):
                with pytest.raises(ValueError, match=f"^{name} must be"):
                    call(replace(weights, **{name: wrong}))
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
            with pytest.raises(ValueError, match=f"^{name} (must be|has 2 experts)"):
                call(replace(weights, **{name: getattr(weights, name)[:2]}))
            parts = list(getattr(weights, name))
            parts[1] = parts[1][:-1]
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call(replace(weights, **{name: parts}))
            shared = replace(weights.shared, **{name: getattr(weights.shared, name)[:-1]})
            with pytest.raises(ValueError, match=f"^shared.{name} must be"):
                call(replace(weights, shared=shared))
    with pytest.raises(ValueError, match=r"router_weight must be \[3, 32\], got \[2, 32\]"):
        call(replace(listed, router_weight=listed.router_weight[:2]))
    with pytest.raises(ValueError, match="fc1_weight has 3 experts, router_bias 2"):
        call(replace(listed, router_bias=listed.router_bias[:2]))
    with pytest.raises(ValueError, match=r"step_embed must be \[1, 16\], got \[0, 16\]"):
        call(replace(listed, step_embed=listed.step_embed[:0]))


def test_a_wrapped_layer_is_an_error_not_left_out():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    for name in ("experts.1", "experts.1.fc1", "shared_expert", "router", "ln", "step_embed"):
        module = MoETransition(16)
        inner = module.get_submodule(name)
        module.set_submodule(
            name, Adapted(16, 32) if name.endswith("fc1") else torch.nn.Sequential(inner)
        )
        with pytest.raises(TypeError, match=rf"^{name} is a .*Merge the wrapper"):
            module(torch.randn(2, 16), 0)
        if name.startswith("experts"):
            with pytest.raises(TypeError, match=r"experts\.1.* is a"):
                module.pack_experts()


def test_a_weight_that_a_call_would_compute_is_an_error():
    for name in ("experts.1.fc1", "router"):
        module = MoETransition(16)
        prune.l1_unstructured(module.get_submodule(name), "weight", 0.5)
        with pytest.raises(TypeError, match=f"^{name} is a Linear with a computed weight"):
            module(torch.randn(2, 16), 0)
        prune.remove(module.get_submodule(name), "weight")
        module(torch.randn(2, 16), 0)


def test_whatever_way_packed_weights_change_they_are_read_anew():
    torch.manual_seed(0)
    z = torch.randn(4, 16)
    module = MoETransition(16).requires_grad_(False).pack_experts()
    fc1 = [expert.fc1 for expert in module.experts]

    def replaced_module():
        module.experts[1].fc1 = torch.nn.Linear(16, 32).requires_grad_(False)

    changes = [
        lambda: fc1[0].weight.data.mul_(2),
        lambda: setattr(fc1[1].weight, "data", torch.randn(32, 16)),
        lambda: setattr(fc1[2], "weight", torch.nn.Parameter(torch.randn(32, 16), False)),
        lambda: [setattr(one.weight, "data", torch.randn(32, 16)) for one in fc1],
        lambda: module.load_state_dict(MoETransition(16).state_dict(), assign=True),
        lambda: module.to(torch.float64).to(torch.float32),
        lambda: torch.nn.init.normal_(module.router.weight.data),
        replaced_module,
    ]
    for change in changes:
        module(z, 0)
        change()
        zero = torch.zeros(4, dtype=torch.long)
        wanted = plain_loop(module, z, torch.zeros(4, 16), zero, ())
        torch.testing.assert_close(module(z, 0)[0], wanted, rtol=1e-5, atol=1e-5)


def test_packing_survives_copies_and_assignment():
    torch.manual_seed(0)
    module = MoETransition(16).requires_grad_(False).pack_experts()
    assigned = copy.deepcopy(module)
    state = {k: v + 1 for k, v in module.state_dict().items()}
    assigned.load_state_dict(state, assign=True)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other, expected in [
        (copied, module.state_dict()),
        (pickled, module.state_dict()),
        (assigned, state),
    ]:
        weights = other.weights()
        stacked = weights.stacked()
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
            assert getattr(stacked, name).data_ptr() == getattr(weights, name)[0].data_ptr()
        assert stacked.fc1_weight.data_ptr() != module.experts[0].fc1.weight.data_ptr()
        for key, value in other.state_dict().items():
            assert torch.equal(value, expected[key])
    module.experts[2].double()
    with pytest.raises(ValueError, match=r"experts.2.fc1.weight is torch.float64 .*float32"):
        module.pack_experts()
    assert module.float().experts[2].fc1.weight.dtype == torch.float32


def test_autocast_without_gradients():
    torch.manual_seed(0)
    module = MoETransition(32)
    z = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(z, 0)[0]
        with torch.no_grad():
            got = module(z, 0)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_composed_runs_or_says_why_not():
    module = MoETransition(32)
    z = torch.randn(2, 32)

    def call():
        return moe_transition(z, None, 0, module.weights(), 2, backend="composed")[0]

    with pytest.raises(BackendError, match="gradient"):
        call()
    expected, _ = moe_transition_reference(z, None, 0, module.requires_grad_(False).weights(), 2)
    torch.testing.assert_close(call(), expected)
    with torch.autocast("cpu"), pytest.raises(BackendError, match="autocast"):
        call()


def test_the_reference_gives_ties_to_the_lowest_index():
    module = MoETransition(16, 8, 3, excluded_expert_indices=[1]).requires_grad_(False)
    module.router.weight.zero_()
    module.router.bias.copy_(torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0]))
    weights, mask = module.weights(), module.exclusion_mask(())
    routing = route(torch.randn(5, 16), None, torch.zeros(5).long(), weights, 3, mask)
    assert routing.experts.tolist() == [[4, 0, 2]] * 5


@pytest.mark.parametrize("grad", [False, True])
def test_compile_and_export_pass_over_it_by_default(grad):
    torch.manual_seed(0)
    module = MoETransition(32).eval().requires_grad_(grad).pack_experts()
    z, step = torch.randn(3, 32), torch.tensor([1, 0, 40])
    expected, aux = module(z, step, z + 1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, got_aux in (
        compiled(z, step, z + 1),
        torch.export.export(module, (z, step, z + 1)).module()(z, step, z + 1),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_aux, aux, rtol=1e-5, atol=1e-6)
