"""Sizes of a session: the published ones, and tiny ones that only show that nothing crashes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        device, dtype: where and in what type.
        shape: key of ``benchmarks.shaped.SHAPES``.
        layers: decoder layers kept; None for all.
        adapter_rows: batch sizes of the adapter.
        short: (rows, prompt tokens) of the rollout bound by weights.
        long: (rows, prompt tokens) of the rollout bound by weights and cache.
        batch: items of a whole embedding.
        official: items that the official path embeds, one at a time.
        visual_tokens: merged tokens of an image.
        sets: weight sets that operations rotate among, so that none stays in the L2 cache.
        copy_bytes: size of the copy that measures bandwidth.
        gemm: side of the product that measures arithmetic.
        sweep_rows: rows of the GEMM and tile sweeps, most wanted first.
        seconds: time for one figure.
        loss_rows: rows (and columns) of the contrastive loss.
        topk: (queries, candidates) of the top-k.
        candidates: configurations that the sweep tries per kernel and rows.
    """

    device: torch.device
    dtype: torch.dtype
    shape: str
    layers: int | None
    adapter_rows: tuple[int, ...]
    short: tuple[int, int]
    long: tuple[int, int]
    batch: int
    official: int
    visual_tokens: int
    sets: int
    copy_bytes: int
    gemm: int
    sweep_rows: tuple[int, ...]
    seconds: float
    loss_rows: tuple[int, ...]
    topk: tuple[int, int]
    candidates: int


REAL = Sizes(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    shape="qwen2-vl-2b",
    layers=None,
    adapter_rows=(1, 2, 4, 8, 16, 32, 64),
    short=(1, 300),
    long=(64, 1000),
    batch=64,
    official=3,
    visual_tokens=256,
    sets=6,
    copy_bytes=4 << 30,
    gemm=8192,
    sweep_rows=(1, 64, 384, 8, 16, 4, 32, 2, 128, 6, 320),
    seconds=0.6,
    loss_rows=(8192, 65536),
    topk=(1024, 10_000_000),
    candidates=16,
)

DRY = Sizes(
    device=torch.device("cpu"),
    dtype=torch.float32,
    shape="tiny",
    layers=None,
    adapter_rows=(1, 5),
    short=(1, 20),
    long=(3, 30),
    batch=3,
    official=1,
    visual_tokens=4,
    sets=2,
    copy_bytes=1 << 20,
    gemm=64,
    sweep_rows=(1, 18),
    seconds=0.01,
    loss_rows=(30,),
    topk=(3, 300),
    candidates=2,
)
