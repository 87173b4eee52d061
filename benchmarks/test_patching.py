"""An official-style evaluation script, accelerated by an environment variable alone.

    pytest benchmarks/test_patching.py --benchmark-only --benchmark-json=out.json
    python -m benchmarks.patched_script small      # the ratios at once

Each round is a process of its own. ``encode_seconds`` is the script's own figure, without imports
and loading; pytest-benchmark's time is that of the whole process.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.machine import describe
from benchmarks.patched_script import COUNTS, DTYPES, MODES, encode_seconds, make_checkpoint
from benchmarks.patched_script import make_data as write_data
from benchmarks.scale import scale

SIZE = scale()


@pytest.fixture(scope="module", params=SIZE.scripts)
def prepared(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Shape, checkpoint and data."""
    folder = tmp_path_factory.mktemp("patching")
    write_data(folder, COUNTS[request.param])
    make_checkpoint(request.param, folder / "checkpoint")
    return request.param, folder / "checkpoint", folder


@pytest.mark.parametrize("mode", MODES)
def test_script(benchmark: Any, prepared: tuple[str, Path, Path], mode: str) -> None:
    shape, checkpoint, data = prepared
    seconds: list[float] = []
    benchmark.group = f"evaluation script, {shape}, {DTYPES[shape]}"
    benchmark.pedantic(
        lambda: seconds.append(encode_seconds(shape, checkpoint, data, mode)),
        rounds=2 if SIZE.name == "full" else 1,
        iterations=1,
    )
    benchmark.extra_info.update(
        describe(),
        section="scripts",
        engine=mode,
        role="reference" if mode == "as it is" else "ours",
        size=SIZE.name,
        tiny=SIZE.tiny,
        dtype=DTYPES[shape],
        samples=2 * COUNTS[shape],
        encode_seconds=min(seconds),
        encode_median=median(seconds),
    )
