"""The size of the run, the model of the whole run, and the machine at the head of the results."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.scale import NAMES, VARIABLE, Scale, scale
from ume_models.embedders.plume import PlumeForEmbedding


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--size``."""
    parser.addoption(
        "--size",
        choices=NAMES,
        help=f"how large the benchmarks are; default {VARIABLE} or small, tiny measures nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Processes that benchmarks start get the size by the environment."""
    chosen = config.getoption("--size", None)
    if chosen:
        os.environ[VARIABLE] = chosen


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What ``ume bench report`` keeps of the machine; called when results are written."""
    from benchmarks.machine import this_machine, versions

    machine_info["ume"] = this_machine()
    machine_info["ume_versions"] = versions()


@pytest.fixture(scope="session")
def size() -> Scale:
    """The scale of this run."""
    return scale()


@pytest.fixture(scope="session")
def model(size: Scale) -> PlumeForEmbedding:
    """One model for the whole run: a large one takes longer to make than to measure."""
    from benchmarks.shaped import shaped_model

    return shaped_model(size.shape, size.dtype, device=str(size.device))
