from __future__ import annotations

import pytest

import ume_models
from ume_models.assets import heldout

TEXTS = ["a red circle", "the digit seven", "a blue square left of a green circle"]


@pytest.fixture(scope="session")
def model():
    return ume_models.load()


@pytest.fixture(scope="session")
def texts():
    return list(TEXTS)


@pytest.fixture(scope="session")
def items():
    """Texts, images, pages and clips: one query and one candidate of every held-out task."""
    return [item for task in heldout().tasks for item in (task.queries[0], task.candidates[0])]


@pytest.fixture(scope="session")
def image(items):
    return next(item["image"] for item in items if "image" in item)
