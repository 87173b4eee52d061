"""Ranking of all queries against all candidates, with bounded memory.

    pytest benchmarks/test_ranking.py --benchmark-only --benchmark-json=out.json

The official evaluator forms all scores and sorts every row in full. Here it gets blocks of queries,
without which it would need 4 GB for 10,000 × 50,000, and ranks only the first queries: its rows do
not depend on each other, so times are compared per query. Everything else ranks all queries.
faiss builds its index before the time begins. ``extra_bytes`` is the peak of resident memory (on a
GPU, of what it holds) above what was there before, the index included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.record import Role, record
from benchmarks.scale import scale
from benchmarks.similarity_engines import ENGINES as SEARCHES
from benchmarks.similarity_engines import Corpus, Search, corpus, official, on_cpu
from ume_kernels import similarity_topk

SIZE = scale()
QUERIES, CANDIDATES, SORTED = SIZE.ranking
K = 10
BLOCK = 64
"""Queries that the official evaluator and PyTorch rank at a time."""
BAR = 5.0


def host() -> Corpus:
    return corpus(QUERIES, CANDIDATES, SIZE.width)


@cache
def data() -> Corpus:
    return host().to(SIZE.device)


def sorted_in_blocks(d: Corpus, k: int) -> Search:
    return official(d.first(SORTED), k, BLOCK)


def in_blocks(q: torch.Tensor, c: torch.Tensor, k: int) -> Search:
    return lambda: torch.cat([(part @ c.T).topk(k).indices for part in q.split(4 * BLOCK)])


Engine = tuple[Role, int, Callable[[Corpus, int], Search]]
ENGINES: dict[str, dict[str, Engine]] = {
    "float32": {
        "similarity_topk": ("ours", QUERIES, SEARCHES["similarity_topk fp32"]),
        "official numpy dot + argsort": ("reference", SORTED, sorted_in_blocks),
        "faiss IndexFlatIP": ("rival", QUERIES, SEARCHES["faiss IndexFlatIP"]),
        "torch matmul + topk, in blocks": (
            "rival", QUERIES, lambda d, k: in_blocks(d.q32, d.c32, k)
        ),
    },
    "bfloat16": {
        "similarity_topk": ("ours", QUERIES, SEARCHES["similarity_topk bf16"]),
        "official numpy dot + argsort, float32": ("reference", SORTED, sorted_in_blocks),
        "torch matmul + topk, in blocks": (
            "rival", QUERIES, lambda d, k: in_blocks(d.q16, d.c16, k)
        ),
    },
}  # fmt: skip
CASES = [(dtype, engine) for dtype, engines in ENGINES.items() for engine in engines]


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_ranking(benchmark: Any, dtype: str, engine: str) -> None:
    if engine.startswith("faiss"):
        pytest.importorskip("faiss")
    role, ranked, prepare = ENGINES[dtype][engine]
    inputs = data()
    where = torch.device("cpu") if on_cpu(engine) else SIZE.device
    gc.collect()
    reset_peak_memory(where)
    before = peak_memory(where)
    found = record(
        benchmark, prepare(host() if on_cpu(engine) else inputs, K), section="ranking",
        engine=engine, role=role, on_cpu=on_cpu(engine),
        group=f"best {K} of {CANDIDATES:,} for {QUERIES:,} queries, D = {SIZE.width}, {dtype}",
        samples=ranked, rounds=2, warm_up=0, filled=False, bar=BAR if role == "ours" else None,
        note=None if ranked == QUERIES else f"{ranked:,} of the queries, {BLOCK} at a time",
    )  # fmt: skip
    benchmark.extra_info["extra_bytes"] = peak_memory(where) - before
    best = similarity_topk(inputs.q32[:SORTED], inputs.c32, 1)[0][:, 0]
    rows = found[: len(best), 0].to(SIZE.device)
    scores = (inputs.q32[: len(best)] * inputs.c32[rows]).sum(1)
    # bfloat16 scores are rounded to 8 bits before they are ranked
    loss = 4e-3 if dtype == "bfloat16" and role == "rival" else 1e-5
    torch.testing.assert_close(scores, best, rtol=0, atol=loss)
