"""The adapter on a GPU, forward and backward, against float32 arithmetic on the same values."""

from __future__ import annotations

import pytest
import torch

from ume_kernels import MoETransition, moe_transition
from ume_kernels.moe_transition.reference import clamp_step, route

pytestmark = pytest.mark.gpu(dry=True)

MARGIN = 0.02
"""Probability by which a row prefers its experts: rounding must not change the choice."""


class Case:
    """An adapter in low and in full precision, and rows whose choice of experts is clear."""

    def __init__(self, rows, width, device, dtype, experts=4, top_k=2, shared=True, excluded=()):
        options = {"num_experts": experts, "top_k": top_k, "use_shared_expert": shared}
        self.module = MoETransition(width, **options).to(device, dtype)
        # a router that prefers: near ties are the exception
        self.module.router.weight.data.mul_(6)
        self.wide = MoETransition(width, **options).to(device)
        self.wide.load_state_dict({k: v.float() for k, v in self.module.state_dict().items()})
        self.top_k = self.module.top_k
        self.excluded = self.module.exclusion_mask(excluded)
        pool = 8 * rows + 64
        z, context = torch.randn(2, pool, width, device=device).to(dtype).unbind(0)
        step = torch.randint(-2, 40, (pool,), device=device)
        ids = clamp_step(step, pool, self.module.step_embed_max_steps, z.device)
        routed = route(
            z.float(), context.float(), ids, self.wide.weights(), self.top_k, self.excluded
        )
        ordered = routed.probs.sort(dim=-1, descending=True).values
        after = ordered[:, self.top_k] if self.top_k < experts else torch.zeros_like(ordered[:, 0])
        clear = (ordered[:, self.top_k - 1] - after > MARGIN).nonzero()[:rows, 0]
        assert clear.numel() == rows, "too few clear rows"
        self.z, self.context, self.step = z[clear], context[clear], step[clear]

    def run(self, kind, backend, context=True):
        module, change = (
            (self.wide, torch.Tensor.float) if kind == "truth" else (self.module, lambda t: t)
        )
        return moe_transition(
            change(self.z),
            change(self.context) if context else None,
            self.step,
            module.weights(),
            self.top_k,
            self.excluded,
            backend=backend,
        )


ROWS = [1, 2, 3, 4, 5, 16, 33, 64, 257]


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [80, 1536, 2048, 3584])
def test_forward(parity, device, dtype, dry_run, width, rows):
    if dry_run and (width != 80 or rows > 33):
        pytest.skip("a dry run takes a few of them")
    case = Case(rows, width, device, dtype)
    got, aux = case.run("low", "triton")
    eager, eager_aux = case.run("low", "torch")
    truth, true_aux = case.run("truth", "torch")
    parity.check(got, eager, truth)
    for name, value in true_aux.items():
        error = abs(float(aux[name] - value))
        assert error <= 2 * abs(float(eager_aux[name] - value)) + 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize(
    ("experts", "top_k", "shared", "excluded"),
    [(1, 1, True, ()), (3, 1, False, ()), (6, 3, False, (1,)), (8, 4, True, ()),
     (16, 4, True, (0, 7)), (4, 2, True, (0, 3))],
)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 19])
def test_other_mixtures(parity, device, dtype, rows, experts, top_k, shared, excluded):
    case = Case(rows, 112, device, dtype, experts, top_k, shared, excluded)
    got = case.run("low", "triton")[0]
    parity.check(got, case.run("low", "torch")[0], case.run("truth", "torch")[0])


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("width", [64, 1536])
def test_backward(parity, device, dtype, dry_run, width, rows):
    if dry_run and width != 64:
        pytest.skip("a dry run takes a few of them")
    case = Case(rows, width, device, dtype)
    direction = torch.randn(rows, width, device=device)

    def gradients(kind, backend):
        module = case.wide if kind == "truth" else case.module
        module.zero_grad()
        change = torch.Tensor.float if kind == "truth" else torch.clone
        z = change(case.z).detach().requires_grad_()
        context = change(case.context).detach().requires_grad_()
        y, aux = moe_transition(
            z, context, case.step, module.weights(), case.top_k, backend=backend
        )
        objective = (y.float() * direction).sum() + aux["router_entropy"] + aux["balance_loss"]
        objective.backward()
        named = {k: p.grad for k, p in module.named_parameters()}
        return {"z": z.grad, "context": context.grad, **named}

    mine, eager = gradients("low", "triton"), gradients("low", "torch")
    truth = gradients("truth", "torch")
    compared = 0
    for name, true in truth.items():
        if true is None or not bool(true.any()):  # an expert that no row chose
            got = mine[name]
            assert got is None or not bool(got.any()), name
            continue
        parity.check(mine[name], eager[name], true, what=f"gradient of {name}")
        compared += 1
    assert compared >= 10


@torch.no_grad()
def test_equal_runs_give_equal_bits(device, dry_run):
    dtype = torch.float32 if dry_run else torch.bfloat16
    for rows in (1, 4, 33):
        case = Case(rows, 64 if dry_run else 1536, device, dtype)
        first = case.run("low", "triton")
        for _ in range(2 if dry_run else 20):
            again = case.run("low", "triton")
            assert torch.equal(again[0], first[0])
            for name, value in first[1].items():
                assert torch.equal(again[1][name], value), name


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33])
def test_a_captured_call_follows_changed_inputs_and_steps(rows):
    device = torch.device("cuda", 0)
    case = Case(rows, 1536, device, torch.bfloat16)
    weights = case.module.weights()
    z, context, step = case.z.clone(), case.context.clone(), case.step.clone()

    def run():
        return moe_transition(z, context, step, weights, 2, backend="triton")[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(8):
        torch.manual_seed(seed)
        z.copy_(torch.randn(z.shape))
        context.copy_(torch.randn(z.shape))
        step.copy_(torch.randint(0, 40, step.shape))
        graph.replay()
        assert torch.equal(out, run())


@torch.no_grad()
@pytest.mark.gpu
def test_two_streams_do_not_share_scratch_memory():
    device = torch.device("cuda", 0)
    cases = [Case(rows, 1536, device, torch.bfloat16) for rows in (3, 40)]
    expected = [case.run("low", "triton")[0] for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(40):
        for case, stream, out in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(case.run("low", "triton")[0])
    torch.cuda.synchronize()
    for out, want in zip(results, expected, strict=True):
        for got in out:
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_torch_compile_passes_over_the_operator():
    device = torch.device("cuda", 0)
    case = Case(6, 256, device, torch.float32)
    weights = case.module.weights()

    def step(z, context):
        y, aux = moe_transition(z * 2, context, case.step, weights, 2)
        return y.sin().sum() + aux["balance_loss"]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        z = case.z.clone().requires_grad_()
        case.module.zero_grad()
        value = function(z, case.context)
        value.backward()
        results.append([value.detach(), z.grad, case.module.router.weight.grad.clone()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
