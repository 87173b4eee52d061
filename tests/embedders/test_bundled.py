"""The bundled checkpoint on items it has never seen, both engines."""

from __future__ import annotations

import pytest
import torch

import ume_models
from ume_models.assets import heldout

pytestmark = pytest.mark.compat

ENGINES = ("fast", "reference")


def test_every_task_ranks_far_above_chance():
    model, kinds = ume_models.load(), set()
    for task in heldout().tasks:
        kinds.add(task.kind)
        order = (model.encode(task.queries) @ model.encode(task.candidates).T).argmax(dim=1)
        ids = [candidate["id"] for candidate in task.candidates]
        hits = [ids[best] in found for best, found in zip(order, task.relevant, strict=True)]
        chance = sum(len(set(found)) for found in task.relevant) / len(hits) / len(ids)
        assert sum(hits) / len(hits) >= 10 * chance, task.name
    assert kinds >= {
        "text→image",
        "image→text",
        "image→image",
        "text→video",
        "video→text",
        "text→page",
    }


def test_both_engines_give_the_same_embeddings():
    """Some of every task: the official loop takes one item at a time."""
    items = [item for task in heldout().tasks for item in task.queries[:3] + task.candidates[:3]]
    fast, official = (ume_models.load(engine=engine).encode(items) for engine in ENGINES)
    assert float((fast - official).abs().max()) <= 1e-5


def test_it_stops_after_the_suffix(recorded):
    model = ume_models.load()
    items = [item for task in heldout().tasks for item in task.queries[:4]]
    assert torch.equal(model.encode(items), model.encode(items, verify_eos=True))
    assert model._reference is None, "no row needed the official loop"
