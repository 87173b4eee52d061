"""Contrastive loss and top-k: against the tensor cores' peak and against what users run today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Timing, measure
from benchmarks.shaped import SHAPES
from ume_kernels import explain
from ume_kernels.contrastive_loss import contrastive_loss
from ume_kernels.similarity_topk import similarity_topk

DENSE_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bf16 FLOP/s without sparsity by a part of the device's name (SXM parts)."""

SCALE = 50.0


def dense_peak() -> float | None:
    """The vendor's figure for this GPU; None for a GPU not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    return next((rate for part, rate in DENSE_PEAK.items() if part in name), None)


def _share(flops: float, timing: Timing) -> dict[str, float | None]:
    peak = dense_peak()
    rate = flops / timing.median
    return {"flops": flops, "flops_per_second": rate, "of_peak": peak and rate / peak}


def _inputs(rows: int, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    width = SHAPES[sizes.shape]["hidden_size"]
    shape = (rows, width)
    q = torch.randn(shape, device=sizes.device, dtype=torch.float32).to(sizes.dtype)
    p = (q.float() + torch.randn(shape, device=sizes.device)).to(sizes.dtype)
    return q.requires_grad_(), p.requires_grad_()


def materialised(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The usual code: the whole matrix, both directions."""
    scores = SCALE * F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T
    labels = torch.arange(q.shape[0], device=q.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def _both_ways(loss: Callable[..., torch.Tensor], q: torch.Tensor, p: torch.Tensor) -> None:
    q.grad = p.grad = None
    loss(q, p).backward()


def _extra_memory(work: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def loss(sizes: Sizes, record: Recorder) -> None:
    """Forward and backward at every row count, the materialised loss where it fits."""
    for rows in sizes.loss_rows:
        _compare_losses(rows, sizes, record)


def _compare_losses(rows: int, sizes: Sizes, record: Recorder) -> None:
    q, p = _inputs(rows, sizes)
    device = sizes.device
    rounds: dict[str, Any] = {"seconds": sizes.seconds, "rounds": (2, 50), "warm_up": 1}

    def plain() -> None:
        _both_ways(materialised, q, p)

    def fused(backend: str) -> None:
        _both_ways(lambda a, b: contrastive_loss(a, b, scale=SCALE, backend=backend), q, p)

    rival, rival_memory = {}, None
    try:
        rival = {"materialised PyTorch": measure(plain, device, **rounds).median}
        rival_memory = _extra_memory(plain, device)
    except torch.cuda.OutOfMemoryError as error:
        record.missed(f"materialised contrastive loss, {rows} rows", error)
    torch.cuda.empty_cache()
    for backend in _backends("contrastive_loss", q, p):
        run = partial(fused, backend)
        name = f"contrastive loss, {rows} rows, {backend}"
        try:
            timing = measure(run, device, **rounds)
        except Exception as error:
            record.missed(name, error)
            continue
        record.add(
            name,
            timing,
            samples=rows,
            ratio_to=rival,
            extra_memory=_extra_memory(run, device),
            materialised_memory=rival_memory,
            **_share(8 * rows * rows * q.shape[1], timing),
        )


def million(sizes: Sizes, record: Recorder) -> None:
    """One forward and backward of a million rows, whose matrix would take terabytes."""
    rows = 1 << 20
    q, p = _inputs(rows, sizes)

    def run() -> None:
        _both_ways(lambda a, b: contrastive_loss(a, b, scale=SCALE), q, p)

    memory = _extra_memory(run, sizes.device)
    timing = measure(run, sizes.device, seconds=0, rounds=(1, 1), warm_up=0)
    record.add(
        f"contrastive loss, {rows} rows",
        timing,
        samples=rows,
        extra_memory=memory,
        inputs=q.nbytes + p.nbytes,
        **_share(8 * rows * rows * q.shape[1], timing),
    )


def topk(sizes: Sizes, record: Recorder) -> None:
    """Top 100 of a large corpus, against the product and ``topk`` in chunks that fit."""
    queries, candidates = sizes.topk
    width = SHAPES[sizes.shape]["hidden_size"]
    corpus = torch.empty(candidates, width, dtype=sizes.dtype, device=sizes.device)
    for block in corpus.split(1 << 18):
        block.copy_(torch.randn(block.shape, device=sizes.device))
    q = torch.randn(queries, width, device=sizes.device).to(sizes.dtype)
    k, chunk = min(100, candidates), 1 << 20

    def chunked() -> torch.Tensor:
        best, index = [], []
        for start in range(0, candidates, chunk):
            scores = q @ corpus[start : start + chunk].T
            value, where = scores.topk(min(k, scores.shape[1]))
            best.append(value)
            index.append(where + start)
        value, where = torch.cat(best, 1).topk(k)
        return torch.cat(index, 1).gather(1, where)

    rounds: dict[str, Any] = {"seconds": sizes.seconds, "rounds": (2, 50), "warm_up": 1}
    rival = measure(chunked, sizes.device, **rounds).median
    for backend in _backends("similarity_topk", q, corpus):
        name = f"top {k} of {candidates}, {queries} queries, {backend}"
        try:
            timing = measure(
                lambda b=backend: similarity_topk(q, corpus, k, backend=b), sizes.device, **rounds
            )
        except Exception as error:
            record.missed(name, error)
            continue
        record.add(
            name,
            timing,
            samples=queries,
            bytes_read=corpus.nbytes,
            ratio_to={"product and topk in chunks": rival},
            **_share(2 * queries * candidates * width, timing),
        )


def _backends(op: str, *tensors: torch.Tensor) -> list[str]:
    """The kernels to compare: both on a GPU; in a dry run the one that runs."""
    if tensors[0].is_cuda:
        return ["cuda", "triton"]
    return [str(explain(op, *tensors).backend)]
