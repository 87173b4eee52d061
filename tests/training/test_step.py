"""The training step: losses against plain definitions, and a run that learns."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.nn.functional as F

from tests.support.bundled.families import FAMILIES
from tests.support.bundled.heldout import build_heldout
from tests.support.bundled.step import contrastive_loss
from tests.support.bundled.tasks import TASKS
from tests.support.bundled.tiny import (
    TASK_WEIGHTS,
    Trained,
    TrainingConfig,
    average_gradients,
    num_latents_at,
    train,
)

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

MICRO = TrainingConfig(
    steps=12,
    batch_size=12,
    workers=1,
    num_latents=2,
    mixed_every=0,
    pictures=24,
    families=("scene",),
    log_every=0,
    evaluate_every=0,
)


def run_micro() -> Trained:
    torch.manual_seed(123)  # a run must not depend on the global generator's state
    return train(
        MICRO,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2},
    )


def test_contrastive_loss_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(5, 8, generator=generator, dtype=torch.double) for _ in range(2))
    keys = ["a", "b", "a", "c", "d"]
    total = 0.0
    for left, right in ((q, p), (p, q)):
        for i in range(5):
            scores = {
                j: 20.0 * float(F.cosine_similarity(left[i], right[j], dim=0))
                for j in range(5)
                if j == i or keys[j] != keys[i]
            }
            total -= scores[i] - float(torch.tensor(list(scores.values())).logsumexp(0))
    assert float(contrastive_loss(q, p, keys, 20.0)) == pytest.approx(total / 10, rel=1e-6)


def test_curriculum_ends_with_all_steps() -> None:
    rng = Random(0)
    ks = [num_latents_at(i / 1000, 8, rng) for i in range(1000)]
    assert ks[0] is None and ks[700] is not None
    late = ks[800:]
    assert late.count(8) > 0.8 * len(late) and min(k for k in late if k is not None) < 4
    grown = [k for k in ks[650:780] if k is not None]
    assert grown == sorted(grown)


def test_a_small_run_learns_and_is_deterministic() -> None:
    first, second = run_micro(), run_micro()
    assert first.losses == second.losses
    # The loss of a stage falls; stages add terms, so compare inside the first one.
    assert first.losses[6] < first.losses[0]
    for name, value in first.network.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second.network.state_dict()[name]), name


def test_gradients_are_averaged_over_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad = torch.arange(6.0).reshape(2, 3)
    # Three other workers with the same gradients; this one did not use the second parameter.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(4))
    average_gradients(parameters, world=4)
    assert parameters[0].grad is not None and parameters[1].grad is not None
    assert torch.equal(parameters[0].grad, torch.arange(6.0).reshape(2, 3))
    assert torch.equal(parameters[1].grad, torch.zeros(4))


def test_every_task_is_drawn_and_has_a_family() -> None:
    assert set(TASK_WEIGHTS) == {task.name for task in TASKS}
    assert {task.family for task in TASKS} == set(FAMILIES)
    assert {task.kind for task in TASKS} == {
        "text→image", "image→text", "image→image", "text→video", "video→text", "text→page",
    }  # fmt: skip


def test_held_out_sets_contain_nothing_from_training() -> None:
    for heldout in build_heldout(seed=4, queries=10, candidates=30):
        family = FAMILIES[heldout.task.family]
        seen = {family.key(spec) for spec in family.split(held_out=False)}
        keys = {entry.key for entry in (*heldout.queries, *heldout.candidates)}
        # There are too few numbers: the handwriting is held out instead.
        assert family.name == "digits" or not keys & seen
        assert all(len(wanted) == 1 for wanted in heldout.relevant())


def test_held_out_sets_follow_from_the_seed() -> None:
    def captions(seed: int) -> list[str]:
        sets = build_heldout(seed, queries=3, candidates=6)
        return [entry.caption for heldout in sets for entry in heldout.candidates]

    assert captions(1) == captions(1) != captions(2)
