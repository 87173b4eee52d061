"""The adapter against recorded outputs of the official module, forward and backward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ume_kernels import MoETransition, moe_transition
from ume_kernels.moe_transition import moe_transition_reference

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


@settings(max_examples=25, deadline=None)
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
    truth, _ = wide(z.float(), 3, context.float())
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
