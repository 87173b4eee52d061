"""A forward of a module for the duration of a block, in one thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from ume_models.patching.detour import detour


def test_a_detour_is_one_threads_own():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    inside, go = threading.Barrier(2), threading.Barrier(2)
    results: list[Any] = []

    def elsewhere() -> None:
        inside.wait()
        results.append(layer(x))
        with detour(layer, lambda x: "theirs"):
            results.append(layer(x))
            go.wait()
        results.append(layer(x))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with detour(layer, lambda x: "outer"):
        inside.wait()
        with detour(layer, lambda x: "inner"):
            assert layer(x) == "inner"
        assert layer(x) == "outer"
        go.wait()
    thread.join()
    plain = layer(x)
    assert "forward" not in vars(layer)
    assert torch.equal(results[0], plain)
    assert results[1] == "theirs"
    assert torch.equal(results[2], plain)


def test_a_detour_gives_back_what_stood_there():
    layer = nn.Linear(2, 2)
    layer.forward = kept = lambda x: "before"

    def fail() -> None:
        with detour(layer, lambda x: "way"):
            assert layer(1) == "way"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert vars(layer)["forward"] is kept
