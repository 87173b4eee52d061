"""Ranking of all queries against all candidates, with bounded memory.

    pytest benchmarks/test_ranking.py --benchmark-only --benchmark-json=out.json

The official evaluator forms all scores and sorts every row in full. Here it gets blocks of queries,
without which it would need 4 GB for 10,000 × 50,000, and ranks only the first queries: its rows do
not depend on each other, so times are compared per query. Everything else ranks all queries.
``extra_bytes`` is the peak of resident memory above what was there before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.record import Role, record
from benchmarks.scale import scale
from benchmarks.similarity_engines import Corpus, corpus
from ume_kernels import similarity_topk

SIZE = scale()
QUERIES, CANDIDATES, SORTED = SIZE.ranking
K = 10
BLOCK = 64
"""Queries that the official evaluator and PyTorch rank at a time."""
BAR = 5.0


@cache
def data() -> Corpus:
    return corpus(QUERIES, CANDIDATES, SIZE.width).to(SIZE.device)


def official(d: Corpus) -> torch.Tensor:
    q, c = d.q32.cpu().numpy(), d.c32.cpu().numpy()
    found = [
        np.argsort(-np.dot(q[start : min(start + BLOCK, SORTED)], c.T), axis=1)[:, :K].copy()
        for start in range(0, SORTED, BLOCK)
    ]
    return torch.from_numpy(np.concatenate(found))


def faiss_flat(d: Corpus) -> torch.Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(d.c32.shape[1])
    index.add(d.c32.cpu().numpy())
    return torch.from_numpy(index.search(d.q32.cpu().numpy(), K)[1])


def in_blocks(q: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.cat([(part @ c.T).topk(K).indices for part in q.split(4 * BLOCK)])


Engine = tuple[Role, int, Callable[[Corpus], torch.Tensor]]
ENGINES: dict[str, dict[str, Engine]] = {
    "float32": {
        "similarity_topk": ("ours", QUERIES, lambda d: similarity_topk(d.q32, d.c32, K)[1]),
        "official numpy dot + argsort": ("reference", SORTED, official),
        "faiss IndexFlatIP": ("rival", QUERIES, faiss_flat),
        "torch matmul + topk, in blocks": ("rival", QUERIES, lambda d: in_blocks(d.q32, d.c32)),
    },
    "bfloat16": {
        "similarity_topk": ("ours", QUERIES, lambda d: similarity_topk(d.q16, d.c16, K)[1]),
        "official numpy dot + argsort, float32": ("reference", SORTED, official),
        "torch matmul + topk, in blocks": ("rival", QUERIES, lambda d: in_blocks(d.q16, d.c16)),
    },
}
CASES = [(dtype, engine) for dtype, engines in ENGINES.items() for engine in engines]


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_ranking(benchmark: Any, dtype: str, engine: str) -> None:
    if engine.startswith("faiss"):
        pytest.importorskip("faiss")
    role, ranked, rank = ENGINES[dtype][engine]
    inputs = data()
    gc.collect()
    reset_peak_memory(SIZE.device)
    before = peak_memory(SIZE.device)
    found = record(
        benchmark, lambda: rank(inputs), section="ranking", engine=engine, role=role,
        group=f"best {K} of {CANDIDATES:,} for {QUERIES:,} queries, D = {SIZE.width}, {dtype}",
        samples=ranked, rounds=2, warm_up=0, filled=False, bar=BAR if role == "ours" else None,
        note=None if ranked == QUERIES else f"{ranked:,} of the queries, {BLOCK} at a time",
    )  # fmt: skip
    benchmark.extra_info["extra_bytes"] = peak_memory(SIZE.device) - before
    best = similarity_topk(inputs.q32[:SORTED], inputs.c32, 1)[0][:, 0]
    rows = found[: len(best), 0].to(SIZE.device)
    scores = (inputs.q32[: len(best)] * inputs.c32[rows]).sum(1)
    # bfloat16 scores are rounded to 8 bits before they are ranked
    loss = 4e-3 if dtype == "bfloat16" and role == "rival" else 1e-5
    torch.testing.assert_close(scores, best, rtol=0, atol=loss)
