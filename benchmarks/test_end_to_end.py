"""Items to embeddings to ranking with the bundled model and the held-out tasks it ships with.

    pytest benchmarks/test_end_to_end.py --benchmark-only --benchmark-json=out.json

Real pictures, clips, pages and captions, decoded from their files in every round. All engines must
put the same candidates first; ``hit@1`` is noted beside the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ume_models
from benchmarks.record import record
from benchmarks.rivals.batched import BatchedTransformers
from benchmarks.scale import scale
from ume_kernels import similarity_topk
from ume_models.assets import Task, heldout

SIZE = scale()
TOP = 10
BATCH = 32
FIRST: dict[str, list[str]] = {}
"""The candidates that the first engine put first."""
Encode = Callable[[list[dict[str, Any]]], torch.Tensor]
Rank = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def tasks() -> list[Task]:
    """All held-out tasks; in a try, the first queries and all candidates of one."""
    every = heldout().tasks
    if not SIZE.tiny:
        return every
    t = every[0]
    return [Task(t.name, t.kind, t.instruction, t.queries[:2], t.candidates[:12], t.relevant[:2])]


def run(encode: Encode, rank: Rank, chosen: list[Task]) -> list[list[str]]:
    """Names of the best candidates of every query of every task."""
    found = []
    for task in chosen:
        vectors = encode([*task.queries, *task.candidates])
        q, c = vectors[: len(task.queries)], vectors[len(task.queries) :]
        names = [item["id"] for item in task.candidates]
        found += [[names[row] for row in rows] for rows in rank(q, c)]
    return found


def best_of_topk(q: torch.Tensor, c: torch.Tensor) -> np.ndarray:
    return similarity_topk(q, c, TOP)[1].numpy()


def best_of_sort(q: torch.Tensor, c: torch.Tensor) -> np.ndarray:
    """The official evaluator: all scores, all of them sorted."""
    return np.argsort(-np.dot(q.numpy(), c.numpy().T), axis=1)[:, :TOP]


def best_of_torch(q: torch.Tensor, c: torch.Tensor) -> np.ndarray:
    return (q @ c.T).topk(TOP).indices.numpy()


@pytest.mark.parametrize("engine", ["fast engine", "official loop", "padded batches"])
def test_end_to_end(benchmark: Any, engine: str) -> None:
    chosen = tasks()
    kind = "reference" if engine == "official loop" else "fast"
    model = ume_models.load(engine=kind)  # type: ignore[arg-type]
    encode: Encode = model.encode
    if engine == "official loop":
        encode = one_by_one(model)
    elif engine == "padded batches":
        encode = BatchedTransformers(model, BATCH).encode
    rank = {"fast engine": best_of_topk, "official loop": best_of_sort}.get(engine, best_of_torch)
    count = sum(len(task.queries) + len(task.candidates) for task in chosen)
    encode(chosen[0].queries[:1])
    found = record(
        benchmark, lambda: run(encode, rank, chosen),
        section="end to end", group=f"{len(chosen)} held-out tasks, bundled model",
        engine=engine, role={"fast engine": "ours", "official loop": "reference"}.get(
            engine, "rival"
        ),
        samples=count, rounds=2, warm_up=0, filled=False,
    )  # fmt: skip
    relevant = [names for task in chosen for names in task.relevant]
    hits = [row[0] in names for row, names in zip(found, relevant, strict=True)]
    benchmark.extra_info["hit@1"] = sum(hits) / len(hits)
    firsts = [row[0] for row in found]
    same = sum(a == b for a, b in zip(firsts, FIRST.setdefault("any", firsts), strict=True))
    assert same >= 0.99 * len(firsts), "the engines rank differently"


def one_by_one(model: Any) -> Encode:
    """The official evaluation: a batch of one, prepared in the same thread."""

    def encode(items: list[dict[str, Any]]) -> torch.Tensor:
        return torch.cat([model.encode([item], workers=0) for item in items])

    return encode
