"""The token policy: admission, recordings, sampling and guards; numbers are tested per family."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import ume_models
from tests.support.recorder import Rerun
from ume_models.rollout.engine import Engine
from ume_models.rollout.graphs import GraphPool
from ume_models.rollout.sampling import Sampling, arg_max, draws, sample
from ume_models.rollout.sequence import build_sequence
from ume_models.rollout.single_pass import SinglePass
from ume_models.rollout.tokens import Token, repeats

GEN_EMB, IM_END = 493, 482


@pytest.fixture(scope="module")
def model(checkpoint_dir):
    return ume_models.load(checkpoint_dir)


@pytest.fixture(scope="module")
def prompts(model):
    """Nine texts of different lengths."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(20, 400, (n,), generator=draw).numpy() for n in range(3, 48, 5)]
    return [build_sequence(ids, model.config) for ids in rows]


def policy_of(model, **changes):
    head = (model.lm_head or model.model.embed_tokens).weight
    made = Token(head, GEN_EMB, "official", (IM_END,), 12)
    return dataclasses.replace(made, **changes)


def engine_of(model, pool=None):
    return Engine(model.config, model.model, model.visual, pool)


@torch.no_grad()
def run(model, prompts, policy, pool=None):
    hidden, trace = engine_of(model, pool).run(prompts, policy, trace=True)
    return hidden, trace.token_ids


@torch.no_grad()
def plain_loop(model, prompt, policy):
    """Each step a pass over everything so far: no cache, no batch, no slots."""
    written, states, positions = [], [], prompt.positions
    while True:
        ids = [*prompt.input_ids.tolist(), *written]
        ids = torch.tensor(ids).numpy()
        whole = dataclasses.replace(prompt, input_ids=ids, positions=positions)
        states.append(last_state(model, whole))
        written.append(int((policy.head @ states[-1]).argmax()))
        if written[-1] in policy.stops or len(written) == policy.budget:
            return written, states
        positions = torch.cat(
            [torch.tensor(positions), torch.full((3, 1), int(positions.max()) + 1)], 1
        ).numpy()


@torch.no_grad()
def last_state(model, prompt):
    """By a pass over the whole prompt."""
    return engine_of(model).run([prompt], SinglePass(lambda prompt: len(prompt) - 1))[0][0]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [plain_loop(model, prompt, policy_of(model)) for prompt in prompts]


@pytest.mark.parametrize("slots", [1, 2, 4, 16])
@pytest.mark.parametrize("recorded", [False, True])
def test_rows_come_and_go(model, prompts, expected, slots, recorded):
    """Budgets end rows at the same step; stops at any: here a few tokens that some rows write."""
    written = [ids for ids, _ in expected]
    stops = tuple({ids[4] for ids in written[::2]} | {written[1][0]})
    order = list(range(len(prompts)))
    random.Random(slots).shuffle(order)
    pool = GraphPool(Rerun()) if recorded else None
    policy = policy_of(model, stops=stops, slots=slots)
    hidden, got = run(model, [prompts[i] for i in order], policy, pool)
    lengths = set()
    for row, number in enumerate(order):
        ids, states = expected[number]
        ends = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
        lengths.add(ends)
        assert got[row] == ids[: ends + 1]
        assert float((hidden[row] - states[ends]).abs().max()) <= 1e-4
    assert len(lengths) > 2


def test_a_row_outgrows_the_arena(model, prompts, monkeypatch):
    monkeypatch.setattr("ume_models.rollout.engine.GROWS_BY", 4)
    policy = policy_of(model, budget=150, slots=2)
    short = [prompts[0], prompts[4]]
    _, whole = run(model, short, policy)
    for prompt, ids in zip(short, whole, strict=True):
        assert len(ids) == 150 or ids[-1] == IM_END
        assert run(model, [prompt], dataclasses.replace(policy, slots=1))[1] == [ids]


def test_a_spent_budget_can_be_closed(model, prompts):
    policy = policy_of(model, budget=5, closing=(7, 8, GEN_EMB))
    open_ended = dataclasses.replace(policy, closing=())
    hidden, written = run(model, prompts[:3], policy)
    for row, prompt in enumerate(prompts[:3]):
        ids = [*prompt.input_ids.tolist(), *written[row], 7, 8, GEN_EMB]
        whole = build_sequence(torch.tensor(ids).numpy(), model.config)
        assert float((hidden[row] - last_state(model, whole)).abs().max()) <= 1e-4
    assert not torch.allclose(hidden, run(model, prompts[:3], open_ended)[0])


def test_a_phrase_said_again_and_again_ends_a_row(model, prompts):
    assert repeats([1, 2, 3, 2, 3, 2, 3], 3)
    assert not repeats([1, 2, 3, 2, 3, 2, 3], 4)
    assert repeats([5, 5], 2)
    assert not repeats([], 2)
    free = run(model, prompts[:4], policy_of(model, budget=80))[1]
    guarded = run(model, prompts[:4], policy_of(model, budget=80, repeats=3))[1]
    for all_of_them, some in zip(free, guarded, strict=True):
        ends = next((n for n in range(1, 81) if repeats(all_of_them[:n], 3)), len(all_of_them))
        assert some == all_of_them[:ends]


def test_a_guarded_row_has_recordings_of_its_own(model, prompts):
    """The host looks after every step then: steps that were recorded eight at a time do not do."""
    engine = engine_of(model, GraphPool(Rerun()))
    for policy in (policy_of(model, budget=40), policy_of(model, budget=40, repeats=3)):
        with torch.no_grad():
            written = engine.run(prompts[:4], policy, trace=True)[1].token_ids
        assert written == run(model, prompts[:4], policy)[1]


def test_a_text_ends_a_row(model, prompts):
    policy = policy_of(model)
    free = run(model, prompts[:3], policy)[1]
    strings = (f"{free[0][3]} {free[0][4]}",)
    ended = dataclasses.replace(policy, strings=strings, text=lambda ids: " ".join(map(str, ids)))
    assert run(model, prompts[:3], ended)[1][0] == free[0][:5]


@pytest.mark.compat
@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=9, top_p=0.8, repetition_penalty=1.3),
        Sampling(repetition_penalty=1.5),
    ],
)
def test_samples_have_the_probabilities_of_transformers(how):
    from transformers.generation import logits_process as theirs

    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 40)
    ids = torch.randint(0, 40, (3, 7))
    present = torch.zeros(3, 40, dtype=torch.bool).scatter(1, ids, True)
    scores = logits.clone()
    if how.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(ids, scores)
    if how.temperature == 0:
        got = sample(logits, present, how, torch.zeros(3, dtype=torch.float64))
        assert torch.equal(got, scores.argmax(1))
        return
    for warp in (
        theirs.TemperatureLogitsWarper(how.temperature),
        *([theirs.TopKLogitsWarper(how.top_k)] if how.top_k else []),
        *([theirs.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []),
    ):
        scores = warp(ids, scores)
    points = 20_000
    quantiles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for row in range(3):
        same = (x[row].expand(points, -1) for x in (logits, present))
        taken = sample(*same, how, quantiles)
        share = torch.bincount(taken, minlength=40) / points
        torch.testing.assert_close(share, scores[row].softmax(0), rtol=0, atol=1e-4)


def test_draws_depend_on_seed_and_row_alone(model, prompts):
    how = Sampling(temperature=3.0, seed=5)
    policy = policy_of(model, sampling=how, slots=3)
    together = run(model, prompts, policy)[1]
    alone = [run(model, [prompt], policy)[1][0] for prompt in prompts[::-1]][::-1]
    assert together == alone
    assert together != run(model, prompts, policy_of(model))[1]
    other = dataclasses.replace(policy, sampling=dataclasses.replace(how, seed=6))
    assert together != run(model, prompts, other)[1]
    assert not torch.equal(draws(prompts[0], 5, 9), draws(prompts[1], 5, 9))


def test_arg_max_takes_the_first_of_equals():
    torch.manual_seed(0)
    head = torch.randn(50, 16)
    head[40] = head[3]
    hidden = torch.cat([head[3:4] * 9, torch.randn(4, 16)])
    assert torch.equal(arg_max(hidden, head), (hidden @ head.T).argmax(1))
    assert int(arg_max(hidden, head)[0]) == 3
