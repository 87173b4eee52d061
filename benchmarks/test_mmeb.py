"""The miniature of MMEB-v2 from tables to scores, against a runner that goes as the official one.

    pytest benchmarks/test_mmeb.py --benchmark-only --benchmark-json=out.json

All 78 tasks in the layouts they are published in, with the bundled model. Both must find the same
scores. Writing the miniature and loading the model are not part of the time; reading tables and
media, writing embeddings, predictions and scores are. Both get two rounds and no warm-up: a round
of the official style takes more than a minute.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import ume_models
from benchmarks.record import record
from benchmarks.rivals import official_evaluation
from benchmarks.scale import scale
from ume_models.mmeb import ReadOptions, Task, benchmark, evaluate, select_tasks

SIZE = scale()
READING = ReadOptions()
FOUND: dict[str, dict[str, float]] = {}
"""Scores by engine."""


def tasks() -> list[Task]:
    """All of them; in a try, one of each modality."""
    names = ["OK-VQA", "MSR-VTT", "VisRAG_ChartQA"] if SIZE.tiny else None
    return select_tasks(benchmark("MMEB-v2"), names=names)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    from ume_models.mmeb.miniature import write_miniature

    folder = tmp_path_factory.mktemp("data") / "miniature"
    write_miniature(folder)
    return folder


@pytest.mark.parametrize("engine", ["ume eval", "official style"])
def test_miniature(benchmark: Any, root: Path, tmp_path: Path, engine: str) -> None:
    ours = engine == "ume eval"
    model = ume_models.load(empty="reference", engine="fast" if ours else "reference")
    chosen, fresh = tasks(), itertools.count()
    model.encode([{"text": "warm"}])

    def run() -> dict[str, float]:
        if not ours:
            return official_evaluation.evaluate(model, chosen, root, READING)
        summary = evaluate(model, chosen, root, tmp_path / str(next(fresh)), reading=READING)
        assert summary is not None
        return {score.task: score.score for score in summary.tasks}

    found = record(
        benchmark, run, section="MMEB-v2 miniature", group=f"{len(chosen)} tasks, bundled model",
        engine=engine, role="ours" if ours else "reference", samples=len(chosen),
        rounds=2, warm_up=0, filled=False, bar=4.0 if ours else None,
    )  # fmt: skip
    FOUND[engine] = found
    if len(FOUND) == 2:
        first, second = FOUND.values()
        assert first == pytest.approx(second), "the runners find other scores"
