"""Search and contrastive loss on the CPU against what else there is, in one run.

    pytest benchmarks/test_similarity.py --benchmark-only --benchmark-json=out.json
    python -m benchmarks.report out.json

``UME_BENCH_SIMILARITY=tiny`` takes sizes that show that the benchmark runs, and measure nothing.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from typing import Any

import pytest
import torch

from benchmarks.loss_memory import extra_bytes
from benchmarks.machine import describe
from benchmarks.similarity_engines import ENGINES, LOSSES, Corpus, corpus, pairs, recall, step

TINY = os.environ.get("UME_BENCH_SIMILARITY") == "tiny"
WIDTH = 48 if TINY else 1536
QUERIES, CANDIDATES, K = (8, 3000, 100) if TINY else (256, 100_000, 100)
PAIRS = 200 if TINY else 8192


@cache
def data() -> Corpus:
    return corpus(QUERIES, CANDIDATES, WIDTH)


@pytest.mark.parametrize("engine", ENGINES)
def test_search(benchmark: Any, engine: str) -> None:
    if engine.startswith("faiss"):
        pytest.importorskip("faiss")
    benchmark.group = f"top-{K} of {CANDIDATES:,}, {QUERIES} queries, D = {WIDTH}"
    search = ENGINES[engine](data(), K)
    slow = engine.startswith("official")
    found = benchmark.pedantic(search, rounds=1 if slow else 5, warmup_rounds=0 if slow else 1)
    share = recall(found, data())
    if "torch bf16" not in engine:  # it ranks scores that were rounded to bfloat16
        assert share == 1.0
    benchmark.extra_info.update(
        describe(), operation="similarity", faiss=version("faiss-cpu"), tiny=TINY, engine=engine,
        recall=share,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(benchmark: Any, loss: str, dtype: str) -> None:
    benchmark.group = f"loss, forward + backward, N = M = {PAIRS:,}, D = {WIDTH}, {dtype}"
    q, p = pairs(PAIRS, WIDTH, getattr(torch, dtype))
    value = benchmark.pedantic(step, (loss, q, p), rounds=3, warmup_rounds=1)
    other = step("materialised PyTorch", q, p)
    assert value == pytest.approx(other, rel=1e-2 if dtype == "bfloat16" else 1e-4)
    extra = extra_bytes(loss, PAIRS, WIDTH, dtype, torch.get_num_threads())
    benchmark.extra_info.update(
        describe(), operation="similarity", tiny=TINY, engine=loss, extra_bytes=extra
    )


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
