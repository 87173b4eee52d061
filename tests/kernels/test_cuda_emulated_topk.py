"""The top-k scan's CUDA C++ kernels on the host: tests/emulator runs their blocks.

The keys they return are compared with those of a full sort.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import emulated
from emulated import ELEMENTS, SOURCES, Topk, address, call, padded

EMPTY = torch.iinfo(torch.int64).min
INF = float("inf")

Tensor = torch.Tensor


@pytest.fixture(params=list(SOURCES))
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return emulated.kernels(request.param)


def normal(rows: int, depth: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator).to(dtype)


@dataclass
class Search:
    """A top-k problem over candidates that start at corpus index `first`."""

    q: Tensor
    c: Tensor
    k: int
    first: int = 0
    splits: int = 1
    normalize: bool = False
    allowed: Tensor | None = None
    best: Tensor | None = None

    def run(self, kernels: ctypes.CDLL) -> tuple[Tensor, bool]:
        """``(keys [Q, k] best first, whether a score was NaN)``."""
        q, c = padded(self.q), padded(self.c)
        queries = q.shape[0]
        q_inv = 1 / q.float().norm(dim=1) if self.normalize else None
        c_inv = 1 / c.float().norm(dim=1) if self.normalize else None
        best = self.best
        if best is None:
            best = torch.full((queries, self.k), EMPTY)
        keys = torch.full((queries, self.splits, self.k), 7)
        buffer = torch.empty((queries + 127) // 128 * 128, self.splits, 512, dtype=torch.int64)
        invalid = torch.zeros(1, dtype=torch.int32)
        allowed = self.allowed
        call(kernels.similarity_topk, Topk(
            q=address(q), c=address(c), element=ELEMENTS[q.dtype], queries=queries,
            candidates=c.shape[0], depth=q.shape[1], q_stride=q.stride(0), c_stride=c.stride(0),
            q_inv=address(q_inv), c_inv=address(c_inv), allowed=address(allowed),
            allowed_stride=0 if allowed is None or allowed.ndim == 1 else allowed.stride(0),
            first=self.first, k=self.k, best=address(best), best_stride=best.stride(0),
            splits=self.splits, buffer=address(buffer), keys=address(keys),
            invalid=address(invalid),
        ))  # fmt: skip
        merged = torch.cat([best, keys.flatten(1)], dim=1).topk(self.k, dim=1, sorted=True)
        return merged.values, bool(invalid)


def pack(scores: Tensor, index: Tensor) -> Tensor:
    """The keys, by the definition in words: order of the scores above, reversed index below."""
    bits = (scores.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -bits - 2**31 - 1)
    return ordered * 2**32 + (0xFFFFFFFF - index)


def expected_keys(search: Search) -> Tensor:
    """From fp32 scores that are exact (small integers), so that ties are ties."""
    s = (search.q.double() @ search.c.double().T).float()
    keys = pack(s, torch.arange(s.shape[1]) + search.first)
    if search.allowed is not None:
        keys = keys.masked_fill(~search.allowed, EMPTY)
    parts = [keys, torch.full((s.shape[0], search.k), EMPTY)]
    if search.best is not None:
        parts.append(search.best)
    return torch.cat(parts, dim=1).topk(search.k, dim=1, sorted=True).values


def integers(rows: int, depth: int, dtype: torch.dtype, seed: int, most: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (rows, depth), generator=generator).to(dtype)


def many_ties() -> Search:
    q, c = integers(130, 24, torch.bfloat16, 1), integers(1500, 24, torch.bfloat16, 2)
    return Search(q, c, k=100, splits=3)


def ascending() -> Search:
    """Every candidate beats all before it: each tile is kept whole and compacted."""
    c = torch.arange(1400.0).div(700, rounding_mode="floor")[:, None].repeat(1, 8)
    c[:, 1] = torch.arange(1400) % 700 / 4
    return Search(torch.tensor([[1024.0, 1, 0, 0, 0, 0, 0, 0]] * 5).half(), c.half(), k=128)


def all_equal() -> Search:
    """Ties only: signed zeros are equal, and the lowest indices win."""
    c = torch.zeros(700, 16, dtype=torch.float16)
    c[::2] = -0.0
    return Search(torch.ones(2, 16, dtype=torch.float16), c, k=100, splits=2)


def fewer_than_k() -> Search:
    q, c = integers(3, 8, torch.bfloat16, 3), integers(20, 8, torch.bfloat16, 4)
    return Search(q, c, k=64, splits=4, first=2**31)


def filtered() -> Search:
    q, c = integers(7, 40, torch.float16, 5), integers(900, 40, torch.float16, 6)
    allowed = torch.rand(7, 900, generator=torch.Generator().manual_seed(7)) < 0.3
    allowed[2] = False
    return Search(q, c, k=10, allowed=allowed, splits=2)


def filtered_for_all() -> Search:
    q, c = integers(4, 8, torch.float16, 8), integers(500, 8, torch.float16, 9)
    allowed = torch.rand(500, generator=torch.Generator().manual_seed(10)) < 0.5
    return Search(q, c, k=1, allowed=allowed)


def continued() -> Search:
    """Keys found before, with ties on both sides of the candidates' indices."""
    q, c = integers(6, 8, torch.bfloat16, 11, most=1), integers(400, 8, torch.bfloat16, 12, most=1)
    before = integers(200, 8, torch.bfloat16, 13, most=1)
    index = torch.cat([torch.arange(100), torch.arange(5000, 5100)])
    best = pack((q.double() @ before.double().T).float(), index).topk(20, dim=1).values
    best[1, 5:] = EMPTY
    q[2] = 0
    best[2] = pack(torch.zeros(20), torch.arange(5000, 5020))
    return Search(q, c, k=20, first=1000, best=best)


def infinite() -> Search:
    """Scores of -inf are scores."""
    c = torch.zeros(30, 8, dtype=torch.bfloat16)
    c[:, 0] = -INF
    c[4, 0] = 1
    q = torch.zeros(2, 8, dtype=torch.bfloat16)
    q[:, 0] = 1
    search = Search(q[:, :1].repeat(1, 8), c, k=5)
    search.c[:, 1:] = 0
    return search


SEARCHES = [many_ties, ascending, all_equal, fewer_than_k, filtered, filtered_for_all, continued,
            infinite]  # fmt: skip


@pytest.mark.parametrize("make", SEARCHES)
def test_best_keys(kernels: ctypes.CDLL, make: type[Search]) -> None:
    search = make()
    keys, invalid = search.run(kernels)
    assert not invalid
    assert torch.equal(keys, expected_keys(search))


def test_normalised_scores(kernels: ctypes.CDLL) -> None:
    q, c = normal(9, 136, torch.bfloat16, 1), normal(700, 136, torch.bfloat16, 2)
    keys, _ = Search(q, c, k=30, splits=2, normalize=True).run(kernels)
    found = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    unit = torch.nn.functional.normalize
    s = unit(q.double()) @ unit(c.double()).T
    expected = s.topk(30, dim=1)
    # The inverse norms are fp32: the order of close scores may differ, their values may not.
    torch.testing.assert_close(s.gather(1, found), expected.values, rtol=0, atol=1e-6)
    assert (found.sort(dim=1).values == expected.indices.sort(dim=1).values).float().mean() > 0.98


@pytest.mark.parametrize("hidden", [False, True], ids=["allowed", "not allowed"])
def test_nan_is_reported(kernels: ctypes.CDLL, hidden: bool) -> None:
    q, c = integers(4, 8, torch.bfloat16, 1), integers(300, 8, torch.bfloat16, 2)
    c[250, 3] = torch.nan
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[250] = not hidden
    keys, invalid = Search(q, c, k=5, allowed=allowed).run(kernels)
    assert invalid == (not hidden)
    assert not bool(((keys & 0xFFFFFFFF) == 0xFFFFFFFF - 250).any())
