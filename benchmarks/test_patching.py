"""An official-style evaluation script, accelerated by an environment variable alone.

    pytest benchmarks/test_patching.py --benchmark-only --benchmark-json=out.json
    python -m benchmarks.patched_script small      # the ratios at once

Each round is a process of its own. ``encode_seconds`` is the script's own figure, without imports
and loading; pytest-benchmark's time is that of the whole process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import describe
from benchmarks.patched_script import COUNTS, DTYPES, MODES, encode_seconds, make_checkpoint
from benchmarks.patched_script import make_data as write_data

SHAPES = ("small", "qwen2-vl-2b")


@pytest.fixture(scope="module", params=SHAPES)
def prepared(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Shape, checkpoint and data; UME_BENCH_LAYERS tries the benchmark itself."""
    layers = os.environ.get("UME_BENCH_LAYERS")
    shape = "tiny" if layers else request.param
    folder = tmp_path_factory.mktemp("patching")
    write_data(folder, COUNTS[shape])
    make_checkpoint(shape, folder / "checkpoint")
    return request.param, folder / "checkpoint", folder


@pytest.mark.parametrize("mode", MODES)
def test_script(benchmark: Any, prepared: tuple[str, Path, Path], mode: str) -> None:
    name, checkpoint, data = prepared
    tiny = "UME_BENCH_LAYERS" in os.environ
    shape = "tiny" if tiny else name
    seconds: list[float] = []
    benchmark.group = f"evaluation script, {name}"
    benchmark.pedantic(
        lambda: seconds.append(encode_seconds(shape, checkpoint, data, mode)),
        rounds=1 if tiny else 2,
        iterations=1,
    )
    benchmark.extra_info.update(
        describe(),
        operation="patching",
        engine=mode,
        tiny=tiny,
        dtype=DTYPES[shape],
        samples=2 * COUNTS[shape],
        encode_seconds=min(seconds),
    )
