"""MMEB-v2 the way its official runner goes: one sample at a time, every task by itself.

Each query and each candidate of a task is a batch of one through the step-by-step engine, after
every picture was decoded and encoded anew as base64 JPEG; candidates are known by name within their
task only; every row of scores is sorted in full, and measures are taken query by query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.official_preprocessing import as_base64
from ume_models.mmeb import ReadOptions, Task, TaskData, read_task
from ume_models.processing.items import Item


def evaluate(
    model: Any, tasks: Sequence[Task], root: Path, reading: ReadOptions
) -> dict[str, float]:
    """The score of each task."""
    return {task.name: _score(model, read_task(task, root, reading)) for task in tasks}


def _score(model: Any, data: TaskData) -> float:
    queries = _embed(model, (query.item for query in data.queries))
    names = list(data.candidates.names)
    rows = _embed(model, map(data.candidates.item, range(len(names))))
    row_of = dict(zip(names, rows, strict=True))
    measure = _hit_at_1 if data.task.metric == "hit@1" else _ndcg_at_5
    values = []
    everything = np.stack(list(row_of.values()))
    for query, vector in zip(data.queries, queries, strict=True):
        own = list(query.candidates or names)
        matrix = np.stack([row_of[name] for name in own]) if query.candidates else everything
        order = np.argsort(-np.dot(vector, matrix.T), kind="stable")
        ranked = [own[number] for number in order]
        grades = query.grades or [1.0] * len(query.relevant)
        values.append(measure(ranked, dict(zip(query.relevant, grades, strict=True))))
    return float(np.mean(values))


def _embed(model: Any, items: Iterable[Item]) -> list[np.ndarray]:
    found = []
    for item in items:
        for source in (*item.images, *(item.video or ())):
            as_base64(source)
        given = item if item.text or item.images or item.video else replace(item, text=" ")
        found.append(model.encode([given], workers=0)[0].numpy())
    return found


def _hit_at_1(ranked: list[str], grade_of: dict[str, float]) -> float:
    return float(ranked[0] in grade_of)


def _ndcg_at_5(ranked: list[str], grade_of: dict[str, float]) -> float:
    def gain(grades: Iterable[float]) -> float:
        return sum(grade / np.log2(place + 2) for place, grade in enumerate(grades))

    best = gain(sorted(grade_of.values(), reverse=True)[:5])
    return gain(grade_of.get(name, 0.0) for name in ranked[:5]) / best
