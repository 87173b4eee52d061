"""Start-up: a fresh process to its first embedding, reading the weights not counted.

    pytest benchmarks/test_startup.py --benchmark-only --benchmark-json=out.json

Each round is a process of its own: interpreter, imports, tokenizer, model, one text. The figure is
the time from asking for the process to its first embedding less what it spent on reading weights;
pytest-benchmark's own time has the end of the process in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.machine import describe
from benchmarks.scale import scale

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "fast engine": ("fast", "ours"),
    "official loop": ("reference", "reference"),
    "transformers, one forward": ("transformers", "rival"),
}
BAR_SECONDS = 3.0


@pytest.mark.parametrize("engine", ENGINES)
def test_startup(benchmark: Any, engine: str) -> None:
    size, (argument, role) = scale(), ENGINES[engine]
    runs: list[dict[str, float]] = []

    def fresh() -> None:
        command = [sys.executable, "-m", "benchmarks.startup", argument, str(time.time())]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        parts = json.loads(done.stdout.splitlines()[-1])
        runs.append({**parts, "counted": parts["whole_seconds"] - parts["weight_seconds"]})

    benchmark.group = "first embedding of a fresh process, bundled model"
    benchmark.pedantic(fresh, rounds=1 if size.tiny else 3, iterations=1)
    best = min(runs, key=lambda run: run["counted"])
    benchmark.extra_info.update(
        describe(), section="start-up", engine=engine, role=role, samples=1, size=size.name,
        tiny=size.tiny, counted_median=median(run["counted"] for run in runs),
        counted_seconds=best.pop("counted"), **best,
    )  # fmt: skip
    if role == "ours":
        benchmark.extra_info["bar_seconds"] = BAR_SECONDS
