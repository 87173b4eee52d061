"""Whole rollouts on a GPU: accuracy, graphs, stale memory, streams and memory growth."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu.prefilled import plan_of, prompts
from benchmarks.shaped import image_items, shaped_model, text_items
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.rollout.graphs import MAX_GRAPHS, GraphPool
from ume_models.rollout.latent import Latent
from ume_models.rollout.tokens import Token

pytestmark = pytest.mark.gpu(dry=True)

# Two correct float32 paths differ by the order of their sums: about 1e-6 on a unit vector.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def made(device, dry_run) -> Callable[[torch.dtype], PlumeForEmbedding]:
    models: dict[torch.dtype, PlumeForEmbedding] = {}

    def get(dtype: torch.dtype) -> PlumeForEmbedding:
        if dtype not in models:
            shape = "tiny" if dry_run else "small"
            models[dtype] = shaped_model(shape, dtype, device=str(device))
        return models[dtype]

    return get


@pytest.fixture
def model(made):
    return made(torch.float32)


def eagerly(model, batch, plan):
    """The rollout launch by launch."""
    kept, model.rollout.graphs = model.rollout.graphs, GraphPool(None)
    try:
        return rolled(model, batch, plan)
    finally:
        model.rollout.graphs = kept


def unit(hidden):
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def rolled(model, batch, plan):
    return unit(model.rollout.run(batch, policy(model, plan))[0])


def policy(model, plan):
    return Latent(plan, model.latent_moe_transition)


@torch.no_grad()
def test_words_of_recordings_are_those_of_single_steps(model, dry_run):
    """Rows come in and leave; with recordings the host looks every few steps only."""
    batch = [prompt for n in (5, 12, 40, 17, 9) for prompt in prompts(model, 1, n, seed=n)]
    head = model.model.embed_tokens.weight
    policy = Token(head, -1, "official", (), 4 if dry_run else 40, slots=2)
    hidden, trace = model.rollout.run(batch, policy, trace=True)
    kept, model.rollout.graphs = model.rollout.graphs, GraphPool(None)
    try:
        expected, wanted = model.rollout.run(batch, policy, trace=True)
    finally:
        model.rollout.graphs = kept
    assert trace.token_ids == wanted.token_ids
    assert float((unit(hidden) - unit(expected)).abs().max()) <= CLOSE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_error_is_at_most_twice_the_official_paths(made, dry_run, kind):
    low = getattr(torch, kind)
    if dry_run and kind == "float16":
        pytest.skip("a dry run takes one of them")
    model, exact = made(low), made(torch.float32)
    # the truth is float32 arithmetic on the very weights that were rounded
    kept = {k: v.clone() for k, v in exact.state_dict().items()}
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    count = 3 if dry_run else 24
    items = [*text_items(count), *image_items(2 if dry_run else 8, 4 if dry_run else 64)]
    try:
        found = {}
        for name, engine, chosen in (
            ("truth", "reference", exact),
            ("eager", "reference", model),
            ("fast", "fast", model),
        ):
            chosen.engine = engine
            found[name] = chosen.encode(items, progress=False, max_new_tokens=0)
            chosen.engine = "fast"
    finally:
        exact.load_state_dict(kept)
        errors = {k: float((v - found["truth"]).norm(dim=-1).sum()) for k, v in found.items()}
    assert errors["eager"] > 1e-4, "nothing was rounded"
    assert errors["fast"] <= 2 * errors["eager"], errors
    cosine = (found["fast"] * found["truth"]).sum(-1)
    assert float(cosine.median()) >= 0.999


@torch.no_grad()
def test_replays_follow_batch_composition_lengths_and_inputs(model, dry_run):
    """Bucket by bucket, each batch against the same rollout without a graph."""
    plan = plan_of(model, steps=3)
    longest = 40 if dry_run else 300
    seed = 0
    for _ in range(1 if dry_run else 3):
        for rows in (1, 2, 3, 4, 3, 1):
            batch = []
            for row in range(rows):
                seed += 1
                batch += prompts(model, 1, 8 + (seed * 37 + row * 11) % longest, seed)
            got = rolled(model, batch, plan)
            want = eagerly(model, batch, plan)
            assert float((got - want).abs().max()) <= CLOSE, (rows, [len(s) for s in batch])
    recorded = len(model.rollout.graphs)
    assert recorded > 0 or dry_run, "nothing was captured"


@torch.no_grad()
def test_every_plan_has_its_own_graph(model):
    batch = prompts(model, 2, 12)
    for steps in (0, 1, 2, 8, 2):
        for excluded in ((), (0,)):
            plan = plan_of(model, steps)
            plan = type(plan)(
                plan.steps, "prefix_last", excluded, plan.suffix_ids, plan.anchor_id
            )
            difference = (rolled(model, batch, plan) - eagerly(model, batch, plan)).abs().max()
            assert float(difference) <= CLOSE, plan


@torch.no_grad()
def test_a_trace_is_replayed_too(model):
    plan = plan_of(model, 4)
    for seed in (1, 2):
        batch = prompts(model, 3, 20, seed)
        _, trace = model.rollout.run(batch, policy(model, plan), True)
        kept, model.rollout.graphs = model.rollout.graphs, GraphPool(None)
        _, want = model.rollout.run(batch, policy(model, plan), True)
        model.rollout.graphs = kept
        torch.testing.assert_close(trace.latents, want.latents, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("stale", [float("nan"), float("inf"), 1e4])
def test_what_lies_unused_in_the_arena_does_not_matter(model, stale):
    plan = plan_of(model, 3)
    small, large = prompts(model, 2, 17, 3), prompts(model, 4, 60, 4)
    rolled(model, large, plan)  # the allocation that all further batches use
    first = rolled(model, small, plan)
    assert model.rollout.arena._storage is not None
    model.rollout.arena._storage.fill_(stale)
    assert torch.equal(rolled(model, small, plan), first)
    alone = rolled(model, small[:1], plan)
    model.rollout.arena._storage.fill_(stale)
    assert torch.equal(rolled(model, small[:1], plan), alone)


@torch.no_grad()
def test_equal_runs_give_equal_bits(made, dry_run):
    model = made(torch.float32 if dry_run else torch.bfloat16)
    plan = plan_of(model)
    batch = prompts(model, 3, 33, 5)
    first = rolled(model, batch, plan)
    for _ in range(2 if dry_run else 20):
        assert torch.equal(rolled(model, batch, plan), first)


@torch.no_grad()
def test_changed_weights_are_seen(model):
    plan = plan_of(model, 2)
    batch = prompts(model, 2, 15, 6)
    before = rolled(model, batch, plan)
    gate = model.model.layers[0].mlp.gate_proj.weight
    kept = gate.detach().clone()
    gate.mul_(-1)
    changed = rolled(model, batch, plan)
    want = eagerly(model, batch, plan)
    gate.copy_(kept)
    assert float((changed - before).abs().max()) > 100 * CLOSE
    assert float((changed - want).abs().max()) <= CLOSE


@torch.no_grad()
def test_threads_with_their_own_streams(model, dry_run, device):
    plan = plan_of(model, 3)
    batches = [prompts(model, rows, 10 + 9 * rows, rows) for rows in (1, 2, 3)]
    expected = [rolled(model, batch, plan) for batch in batches]
    problems: list[object] = []

    def work(number: int) -> None:
        try:
            stream = None if device.type == "cpu" else torch.cuda.Stream(device)
            with torch.no_grad(), torch.cuda.stream(stream):
                for _ in range(2 if dry_run else 30):
                    got = rolled(model, batches[number], plan)
                    if float((got - expected[number]).abs().max()) > CLOSE:
                        problems.append(number)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@torch.no_grad()
@pytest.mark.gpu
def test_a_thousand_replays_leave_memory_as_it_is(made):
    model = made(torch.bfloat16)
    plan = plan_of(model)
    batches = [prompts(model, rows, 20 + 13 * rows, rows) for rows in (1, 2, 3, 4)]
    for batch in batches * 10:
        rolled(model, batch, plan)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(1000):
        rolled(model, batches[number % len(batches)], plan)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@torch.no_grad()
@pytest.mark.gpu
def test_graphs_are_bounded_and_old_ones_come_back_right(model):
    plans = [plan_of(model, steps) for steps in range(1, MAX_GRAPHS // 2 + 2)]
    batches = [prompts(model, rows, 10, rows) for rows in (1, 2)]
    expected = {}
    for _ in range(2):
        for number, plan in enumerate(plans):
            for which, batch in enumerate(batches):
                got = rolled(model, batch, plan)
                assert len(model.rollout.graphs) <= MAX_GRAPHS
                want = expected.setdefault((number, which), eagerly(model, batch, plan))
                assert float((got - want).abs().max()) <= CLOSE
