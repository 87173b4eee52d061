"""The bundled checkpoint on items it has never seen, both engines."""

from __future__ import annotations

import pytest
import torch

import ume_models
from ume_models.assets import heldout

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def rankings():
    """Per task: relevant candidate ids of every query, and the order each engine puts them in."""
    out = {}
    for engine in ("fast", "reference"):
        model = ume_models.load(engine=engine)
        for task in heldout().tasks:
            queries = model.encode(task.queries)
            candidates = model.encode(task.candidates)
            scores = queries @ candidates.T
            order = scores.argsort(dim=1, descending=True, stable=True)
            out.setdefault(task.name, {"task": task})[engine] = (order, scores)
    return out


def test_every_task_ranks_far_above_chance(rankings):
    assert {entry["task"].kind for entry in rankings.values()} >= {
        "text→image",
        "image→text",
        "image→image",
        "text→video",
        "video→text",
        "text→page",
    }
    for name, entry in rankings.items():
        task, order = entry["task"], entry["fast"][0]
        ids = [candidate["id"] for candidate in task.candidates]
        hits = [ids[order[row, 0]] in set(found) for row, found in enumerate(task.relevant)]
        chance = sum(len(set(found)) for found in task.relevant) / len(hits) / len(ids)
        assert sum(hits) / len(hits) >= 10 * chance, name


def test_both_engines_give_the_same_ranking(rankings):
    for name, entry in rankings.items():
        (fast, scores), (official, expected) = entry["fast"], entry["reference"]
        assert float((scores - expected).abs().max()) <= 1e-5, name
        assert torch.equal(fast, official), name


def test_it_stops_after_the_suffix(recorded):
    model = ume_models.load()
    items = [item for task in heldout().tasks for item in task.queries[:4]]
    assert torch.equal(model.encode(items), model.encode(items, verify_eos=True))
    assert model._reference is None, "no row needed the official loop"
