"""The ways to search and to take the loss that the benchmarks compare.

A search is prepared first, so that neither an index nor a conversion is part of its time. faiss and
the official evaluator run on the CPU whatever the machine has: they are given a corpus there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from ume_kernels.similarity_topk import similarity_topk

SCALE = 50.0
BLOCK = 512


@dataclass(frozen=True)
class Corpus:
    """Unit vectors rounded to bfloat16, and the same numbers in float32."""

    q16: torch.Tensor
    c16: torch.Tensor
    q32: torch.Tensor
    c32: torch.Tensor

    def to(self, device: torch.device) -> Corpus:
        """The same on a device."""
        return Corpus(*(getattr(self, name).to(device) for name in ("q16", "c16", "q32", "c32")))

    def first(self, queries: int) -> Corpus:
        """The same candidates for fewer queries."""
        return Corpus(self.q16[:queries], self.c16, self.q32[:queries], self.c32)


@cache
def corpus(queries: int, candidates: int, width: int) -> Corpus:
    """Random unit vectors, in the host's memory."""
    generator = torch.Generator().manual_seed(0)
    q, c = (
        normalize(torch.randn(rows, width, generator=generator), dim=1).bfloat16()
        for rows in (queries, candidates)
    )
    return Corpus(q, c, q.float(), c.float())


Search = Callable[[], torch.Tensor]
"""Finds the indices ``[Q, k]``."""


def on_cpu(engine: str) -> bool:
    """Whether it uses no GPU even where there is one."""
    return engine.startswith(("faiss", "official"))


def faiss_flat(data: Corpus, k: int) -> Search:
    """``IndexFlatIP``, built before."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(data.c32.shape[1])
    index.add(data.c32.numpy())
    return lambda: torch.from_numpy(index.search(data.q32.numpy(), k)[1])


def official(data: Corpus, k: int, block: int | None = None) -> Search:
    """The official evaluator: all scores, all of them sorted; for ``block`` queries at a time."""
    q, c = data.q32.numpy(), data.c32.numpy()
    step = block or len(q)

    def search() -> torch.Tensor:
        found = [
            np.argsort(-np.dot(q[start : start + step], c.T), axis=1)[:, :k].copy()
            for start in range(0, len(q), step)
        ]
        return torch.from_numpy(np.concatenate(found))

    return search


ENGINES: dict[str, Callable[[Corpus, int], Search]] = {
    "similarity_topk bf16": lambda d, k: lambda: similarity_topk(d.q16, d.c16, k)[1],
    "similarity_topk fp32": lambda d, k: lambda: similarity_topk(d.q32, d.c32, k)[1],
    "faiss IndexFlatIP": faiss_flat,
    "torch bf16 matmul + topk": lambda d, k: lambda: (d.q16 @ d.c16.T).topk(k).indices,
    "torch fp32 matmul + topk": lambda d, k: lambda: (d.q32 @ d.c32.T).topk(k).indices,
    "official numpy dot + argsort": official,
}
"""Each prepares a search."""


@cache
def _kth_best(data: Corpus, k: int) -> torch.Tensor:
    """The k-th best score ``[Q, 1]`` of every query in float64, less float32 rounding."""
    wide = data.c32.double().T
    parts = [(rows.double() @ wide).topk(k).values[:, -1:] for rows in data.q32.split(32)]
    return torch.cat(parts) - 1e-6


def recall(indices: torch.Tensor, data: Corpus) -> float:
    """Share of the results that are among the k best by float64 scores.

    A result that is short of the k-th best by no more than float32 rounding counts.
    """
    least, found = _kth_best(data, indices.shape[1]), 0
    indices = indices.to(data.q32.device)
    for q, rows, limit in zip(data.q32, indices, least, strict=True):
        found += int((data.c32[rows].double() @ q.double() >= limit).sum())
    return found / indices.numel()


def materialised(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The symmetric InfoNCE in plain PyTorch, with the score matrix in memory."""
    scores = SCALE * (normalize(q, dim=1) @ normalize(p, dim=1).T).float()
    labels = torch.arange(q.shape[0], device=q.device)
    return (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2


def fused(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The same by ``contrastive_loss``."""
    from ume_kernels.contrastive_loss import contrastive_loss

    return contrastive_loss(q, p, scale=SCALE)


def in_blocks(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch with bounded memory: blocks of rows, recomputed in the backward."""
    q, p = normalize(q, dim=1), normalize(p, dim=1)
    labels = torch.arange(q.shape[0], device=q.device)

    def part(rows: torch.Tensor, other: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return cross_entropy(SCALE * (rows @ other.T).float(), at, reduction="sum")

    total = q.new_zeros((), dtype=torch.float32)
    for one, other in ((q, p), (p, q)):
        for rows, at in zip(one.split(BLOCK), labels.split(BLOCK), strict=True):
            total = total + checkpoint(part, rows, other, at, use_reentrant=False)
    return total / (2 * q.shape[0])


LOSSES = {
    "contrastive_loss": fused,
    "materialised PyTorch": materialised,
    "PyTorch in blocks, recomputed": in_blocks,
}


def pairs(
    count: int, width: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matching random vectors that need gradients."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(count, width, generator=generator)
    p = q / 8 + torch.randn(count, width, generator=generator)  # not so near that the loss is 0
    q, p = q.to(device, dtype), p.to(device, dtype)
    return q.requires_grad_(), p.requires_grad_()


def step(loss: str, q: torch.Tensor, p: torch.Tensor) -> float:
    """Forward and backward; returns the loss."""
    q.grad = p.grad = None
    value = LOSSES[loss](q, p)
    value.backward()
    return float(value.detach())
