"""Search and contrastive loss against what else there is, in one run.

pytest benchmarks/test_similarity.py --benchmark-only --benchmark-json=out.json
ume bench report out.json
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.cost import contrastive_loss, similarity_topk
from benchmarks.limits import floor
from benchmarks.loss_memory import extra_bytes
from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.record import Role, record
from benchmarks.scale import scale
from benchmarks.similarity_engines import (
    ENGINES,
    LOSSES,
    Corpus,
    corpus,
    on_cpu,
    pairs,
    recall,
    step,
)

SIZE = scale()
QUERIES, CANDIDATES, PAIRS = SIZE.search
WIDTH, K = SIZE.width, 100


def host() -> Corpus:
    return corpus(QUERIES, CANDIDATES, WIDTH)


@cache
def data() -> Corpus:
    return host().to(SIZE.device)


def role(engine: str) -> Role:
    if engine.startswith(("similarity_topk", "contrastive_loss")):
        return "ours"
    return "reference" if engine.startswith(("official", "materialised")) else "rival"


@pytest.mark.parametrize("engine", ENGINES)
def test_search(benchmark: Any, engine: str) -> None:
    if engine.startswith("faiss"):
        pytest.importorskip("faiss")
    search = ENGINES[engine](host() if on_cpu(engine) else data(), K)
    work = similarity_topk(QUERIES, CANDIDATES, WIDTH, K)
    found = record(
        benchmark, search, section="operation", engine=engine, role=role(engine), samples=QUERIES,
        group=f"top-{K} of {CANDIDATES:,}, {QUERIES} queries, D = {WIDTH}", filled=False,
        rounds=3, floor_seconds=floor([work]) if engine.endswith("bf16") else None,
        on_cpu=on_cpu(engine),
    )  # fmt: skip
    share = recall(found, data())
    if "torch bf16" not in engine:  # it ranks scores that were rounded to bfloat16
        assert share == 1.0
    benchmark.extra_info["recall"] = share


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(benchmark: Any, loss: str, dtype: str) -> None:
    q, p = pairs(PAIRS, WIDTH, getattr(torch, dtype), SIZE.device)
    reset_peak_memory(SIZE.device)
    before = peak_memory(SIZE.device)
    work = contrastive_loss(PAIRS, PAIRS, WIDTH, backward=True)
    value = record(
        benchmark, lambda: step(loss, q, p), section="training", engine=loss, role=role(loss),
        group=f"loss, forward + backward, N = M = {PAIRS:,}, D = {WIDTH}, {dtype}", rounds=3,
        samples=PAIRS, filled=False,
        floor_seconds=floor([work]) if dtype == "bfloat16" else None,
    )  # fmt: skip
    if SIZE.device.type == "cuda":
        benchmark.extra_info["extra_bytes"] = peak_memory(SIZE.device) - before
    else:  # in a process of its own: this one keeps what it once allocated
        threads = torch.get_num_threads()
        benchmark.extra_info["extra_bytes"] = extra_bytes(loss, PAIRS, WIDTH, dtype, threads)
    other = step("materialised PyTorch", q, p)
    assert value == pytest.approx(other, rel=1e-2 if dtype == "bfloat16" else 1e-4)
