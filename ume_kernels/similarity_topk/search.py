"""The search itself: argument checks, backend choice, and the walk over the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from ume_kernels import dispatch, triton_backend
from ume_kernels.dispatch import Backend
from ume_kernels.similarity_topk import arguments, backends, blocked, keys, stream
from ume_kernels.similarity_topk.backends import Scans
from ume_kernels.similarity_topk.stream import Rows, Span

Result = tuple[torch.Tensor, torch.Tensor]


def search(
    q: torch.Tensor,
    c: Any,
    k: int,
    normalize: bool,
    segments: Sequence[Any] | None,
    allowed: torch.Tensor | None,
    block: int | None,
    sorted: bool,
    backend: Backend | str | None,
) -> Result:
    """``similarity_topk`` outside of compiled graphs."""
    corpus = stream.in_memory(c)
    arguments.check_matrices(q, corpus, k, block)
    q = q.resolve_neg()  # kernels read the bytes
    if isinstance(corpus, torch.Tensor):
        corpus = corpus.resolve_neg()
    arguments.check_allowed(allowed, q, corpus.shape[0])
    ragged = None
    if segments is not None:
        ragged = arguments.segments_of(segments, q.shape[0], corpus.shape[0], q.device)
        owner = keys.owners(ragged[1], ragged[0].shape[0])
        ragged = arguments.allowed_only(ragged, allowed, owner)
    found = keys.empty_keys(q.shape[0], k, q.device)
    like = q.new_empty(0, q.shape[1], dtype=corpus.dtype)  # of blocks that come later
    if isinstance(corpus, torch.Tensor) and corpus.device == q.device:
        like = corpus
    rows = None if ragged is None else ragged[0]
    chosen = dispatch.select(backends.NAME, q, like, found, rows, backend=backend)
    if not q.shape[0]:
        return keys.unpack(found)

    def run(scans: Scans) -> tuple[torch.Tensor, torch.Tensor | bool]:
        walk = _Walk(q, corpus, scans, normalize, block)
        return walk.all(found, allowed) if ragged is None else walk.listed(found, *ragged)

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        found, invalid = _attempt(chosen, run, backend, q.device)
        if bool(invalid):
            raise ValueError(
                "a score is NaN: the queries or the candidates hold NaN or infinity, "
                "or a norm overflows"
            )
        return keys.unpack(keys.best(found, k) if sorted else found)


def _attempt(
    chosen: Backend,
    run: Callable[[Scans], tuple[torch.Tensor, torch.Tensor | bool]],
    insisted: Backend | str | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | bool]:
    if chosen is not Backend.TRITON:
        return run(backends.implementation(chosen))
    return triton_backend.attempt(
        backends.NAME,
        lambda: run(backends.implementation(Backend.TRITON)),
        lambda: run(blocked),
        insisted,
        device,
    )


class _Walk:
    """One pass over a corpus, in ascending order."""

    def __init__(
        self,
        q: torch.Tensor,
        corpus: torch.Tensor | Rows,
        scans: Scans,
        normalize: bool,
        block: int | None,
    ) -> None:
        self._q = q
        self._corpus = corpus
        self._scans = scans
        self._normalize = normalize
        self._block = block
        self._q_inv = blocked.inverse_norms(q) if normalize else None

    def all(
        self, found: torch.Tensor, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge every candidate that is allowed into the keys."""
        invalid = torch.zeros((), dtype=torch.bool, device=self._q.device)
        for first, block in self._blocks(self._spans()):
            mask = allowed
            if mask is not None:
                mask = mask[..., first : first + block.shape[0]].to(self._q.device)
            found, bad = self._scans.scan(
                self._q, block, first, found, q_inv=self._q_inv, c_inv=self._c_inv(block),
                allowed=mask,
            )  # fmt: skip
            invalid |= bad
        return found, invalid

    def listed(
        self, found: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the candidates that each query lists into the keys."""
        invalid = torch.zeros((), dtype=torch.bool, device=self._q.device)
        k = found.shape[1]
        if not rows.shape[0]:
            return found, invalid
        by_row = rows.argsort(stable=True)
        ascending, owner = rows[by_row], keys.owners(offsets, rows.shape[0])[by_row]
        spans = self._spans()
        starts = torch.tensor([start for start, _ in spans] + [spans[-1][1]], device=rows.device)
        edges = torch.searchsorted(ascending, starts).tolist()
        used = {
            span[0]: slice(low, high)
            for span, (low, high) in zip(spans, pairwise(edges), strict=True)
            if low < high
        }
        for first, block in self._blocks([span for span in spans if span[0] in used]):
            here = used[first]
            order = owner[here].argsort(stable=True)
            sizes = owner[here].bincount(minlength=found.shape[0])
            rows = ascending[here][order] - first
            part, bad = self._scans.scan_segments(
                self._q, block, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), rows, k,
                first=first, q_inv=self._q_inv, c_inv=self._c_inv(block, rows),
            )  # fmt: skip
            found = part if len(used) == 1 else keys.best(torch.cat([found, part], dim=1), k)
            invalid |= bad
        return found, invalid

    def _c_inv(self, block: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        return blocked.inverse_norms(block, rows) if self._normalize else None

    def _spans(self) -> list[Span]:
        count, width = self._corpus.shape
        step = count
        if self._block is not None or not self._resident():
            budget = stream.DEVICE_BLOCK_BYTES if self._q.is_cuda else stream.HOST_BLOCK_BYTES
            size = self._corpus.dtype.itemsize
            step = stream.block_rows(self._block, count, width, size, budget)
        return stream.spans(count, step)

    def _resident(self) -> bool:
        corpus = self._corpus
        return isinstance(corpus, torch.Tensor) and corpus.device == self._q.device

    def _blocks(self, spans: Sequence[Span]) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the content of each span, on the device of the queries."""
        corpus = self._corpus
        if isinstance(corpus, torch.Tensor):
            if self._resident():
                return ((start, corpus[start:stop]) for start, stop in spans)
            corpus = Rows(corpus)
        if self._q.is_cuda:
            return stream.copied(corpus, spans, stream.CudaLanes(self._q.device))
        return stream.read_ahead(corpus, spans)
