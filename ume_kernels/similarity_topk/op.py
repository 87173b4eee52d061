"""``similarity_topk``: argument checks, backend choice, and the walk over the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from ume_kernels import dispatch, triton_backend
from ume_kernels.dispatch import Backend
from ume_kernels.similarity_topk import arguments, backends, blocked, keys, stream
from ume_kernels.similarity_topk.backends import Scans
from ume_kernels.similarity_topk.stream import Rows, RowSlices, Span

Result = tuple[torch.Tensor, torch.Tensor]


def similarity_topk(
    q: torch.Tensor,
    c: torch.Tensor | RowSlices,
    k: int,
    *,
    normalize: bool = False,
    segments: Sequence[Any] | None = None,
    allowed: torch.Tensor | None = None,
    block: int | None = None,
    sorted: bool = True,
    backend: Backend | str | None = None,
) -> Result:
    """The ``k`` candidates with the largest inner product ``<q_i, c_j>`` for each query.

    Products of the inputs as they are, sums and scores in float32. Equal scores keep the order of
    their indices, whatever the blocks are. An overflow to ±inf ranks as such. The ``Q x N`` scores
    are never stored. Not differentiable. PyTorch's own products on CUDA (k above 128) follow its
    float32 matmul precision, full float32 unless the program enabled TF32.

    Args:
        q: queries ``[Q, D]``, float32, float16 or bfloat16.
        c: candidates ``[N, D]``, whose dtype may differ: a tensor on the same device, or, streamed
            block by block with the next one on its way, a CPU tensor for queries on a CUDA device,
            a numpy array (also memory-mapped), or anything with shape, dtype and slices of rows.
        k: results per query, ``1 <= k <= N``. On a GPU at most 128 are selected inside the product
            and more are merged block by block; on a CPU any number is selected inside.
        normalize: divide by ``max(|q_i|, 1e-12) max(|c_j|, 1e-12)``: cosine. No copy is made.
        segments: what each query ranks instead of all of ``c``: a list of Q lists of rows of
            ``c``, or a tuple of rows ``[E]`` of all queries and the offset ``[Q + 1]`` of each,
            int64. Lists may overlap, be shorter than ``k`` or empty; a row listed twice is
            returned twice.
        allowed: bool ``[N]`` or ``[Q, N]``: only these may be returned.
        block: candidates scored, and where they are streamed read and copied, at a time (rounded
            up to a multiple of 256). Chosen by size if None.
        sorted: best first; else in any order.
        backend: insist on one of ``ume_kernels.Backend``; ``UME_BACKEND`` does so too.

    Returns:
        ``(scores [Q, k] float32, indices [Q, k] int64)`` on the device of ``q``. Where fewer than
        ``k`` candidates are listed and allowed, the rest is −inf and −1.

    Raises:
        ValueError: a shape, dtype or device does not fit, ``k`` is out of range, or a score is
            NaN: an input holds NaN or infinity, or a norm overflows float32.
        TypeError: ``c`` is none of these.
        BackendError: the backend asked for cannot run.
    """
    tensors = (q, c) if allowed is None else (q, c, allowed)
    if not torch.compiler.is_compiling():
        return search(q, c, k, normalize, segments, allowed, block, sorted, backend)
    if segments is None and all(map(torch.is_tensor, tensors)):
        assert isinstance(c, torch.Tensor)
        wanted = None if backend is None else str(backend)
        return _op(q.detach(), c.detach(), k, normalize, allowed, block, sorted, wanted)
    from ume_kernels.similarity_topk.outside_graphs import search as outside

    return outside(q, c, k, normalize, segments, allowed, block, sorted, backend)


@torch.library.custom_op("ume::similarity_topk", mutates_args=())
def _op(
    q: torch.Tensor,
    c: torch.Tensor,
    k: int,
    normalize: bool,
    allowed: torch.Tensor | None,
    block: int | None,
    sorted: bool,
    backend: str | None,
) -> Result:
    return search(q, c, k, normalize, None, allowed, block, sorted, backend)


@_op.register_fake
def _(q: torch.Tensor, c: torch.Tensor, k: int, *others: object) -> Result:
    size = (q.shape[0], k)
    return q.new_empty(size, dtype=torch.float32), q.new_empty(size, dtype=torch.int64)


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
