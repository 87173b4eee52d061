"""One model of 2B shape for the whole run: it takes longer to make than to measure."""

from __future__ import annotations

import os

import pytest

from ume_models.embedders.plume import PlumeForEmbedding


@pytest.fixture(scope="session")
def model_2b() -> PlumeForEmbedding:
    from benchmarks.shaped import shaped_model

    # UME_BENCH_LAYERS=2 makes a quick check of the benchmarks themselves, not a measurement
    layers = os.environ.get("UME_BENCH_LAYERS")
    return shaped_model("qwen2-vl-2b", layers=None if layers is None else int(layers))
