"""What ``similarity_topk`` may be called with, and the one form the backends see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ume_kernels.similarity_topk.keys import MAX_CANDIDATES
from ume_kernels.similarity_topk.stream import Rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Segments = tuple[torch.Tensor, torch.Tensor]
"""Rows ``[E]`` of all queries, one after another, and where each begins, ``[Q + 1]``; int64."""


def check_matrices(q: torch.Tensor, c: torch.Tensor | Rows, k: int, block: int | None) -> None:
    """Raise ValueError unless the queries, the corpus, ``k`` and ``block`` fit each other."""
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}: torch.as_tensor makes one")
    for name, matrix in (("q", q), ("c", c)):
        if len(matrix.shape) != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(matrix.shape)}")
        if matrix.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {matrix.dtype}")
    if q.shape[1] != c.shape[1]:
        raise ValueError(f"q has {q.shape[1]} columns and c has {c.shape[1]}: they must agree")
    # A corpus in host memory goes to the queries; queries never leave their device.
    if isinstance(c, torch.Tensor) and c.device != q.device and not (c.is_cpu and q.is_cuda):
        raise ValueError(
            f"q is on {q.device} and c on {c.device}: they must be on one device, "
            "or c on the CPU and q on a CUDA device"
        )
    if c.shape[0] > MAX_CANDIDATES:
        raise ValueError(f"c has {c.shape[0]} rows; at most {MAX_CANDIDATES} are supported")
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= c.shape[0]:
        raise ValueError(f"k is {k}, but must be 1 … {c.shape[0]} (the number of candidates)")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")


def check_allowed(allowed: torch.Tensor | None, q: torch.Tensor, candidates: int) -> None:
    """Raise ValueError unless ``allowed`` is a mask of the candidates or of the pairs."""
    if allowed is None:
        return
    if not isinstance(allowed, torch.Tensor):
        raise TypeError(f"allowed must be a tensor, got {type(allowed).__name__}")
    shapes = ((candidates,), (q.shape[0], candidates))
    if allowed.dtype is not torch.bool or tuple(allowed.shape) not in shapes:
        raise ValueError(
            f"allowed must be bool [{candidates}] or [{q.shape[0]}, {candidates}], "
            f"got {allowed.dtype} {list(allowed.shape)}"
        )
    if allowed.device != q.device and not allowed.is_cpu:
        raise ValueError(f"allowed is on {allowed.device} and q on {q.device}")


def segments_of(segments: Any, queries: int, candidates: int, device: torch.device) -> Segments:
    """Both forms of ``segments`` as rows and offsets on ``device``.

    Raises:
        ValueError: a list does not fit the queries, or a row is not one of the corpus.
    """
    if isinstance(segments, tuple):
        if len(segments) != 2:
            raise ValueError(
                f"a tuple of segments is (rows, offsets), got {len(segments)} parts; "
                "give one list per query as a list"
            )
        rows, offsets = (_integers(part, device) for part in segments)
        if offsets.shape != (queries + 1,):
            raise ValueError(
                f"the offsets of {queries} queries must be [{queries + 1}], got "
                f"{list(offsets.shape)} (a tuple is (rows, offsets); give one list per query as "
                "a list)"
            )
        steps = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != rows.shape[0] or bool((steps < 0).any()):
            raise ValueError(f"the offsets must rise from 0 to the {rows.shape[0]} rows")
    else:
        lists = _lists(segments, queries)
        sizes = torch.tensor([0, *(part.shape[0] for part in lists)], dtype=torch.int64)
        rows, offsets = torch.cat([*lists, sizes[:0]]).to(device), sizes.cumsum(0).to(device)
    if rows.shape[0] and (int(rows.min()) < 0 or int(rows.max()) >= candidates):
        wrong = rows[(rows < 0) | (rows >= candidates)][0]
        raise ValueError(f"segments name row {int(wrong)}, but c has {candidates} rows")
    return rows, offsets


def _lists(segments: Sequence[Any], queries: int) -> list[torch.Tensor]:
    if len(segments) != queries:
        raise ValueError(f"{len(segments)} segments for {queries} queries: they must agree")
    return [_integers(part, torch.device("cpu")) for part in segments]


def _integers(values: Any, device: torch.device) -> torch.Tensor:
    # Through NumPy, as torch looks up a pandas Series by label.
    tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    if not tensor.numel():
        tensor = tensor.long()  # an empty list is float32
    if tensor.ndim != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"segments are vectors of int64, got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    return tensor.to(device, torch.int64)


def allowed_only(segments: Segments, allowed: torch.Tensor | None, owner: torch.Tensor) -> Segments:
    """The segments without the rows that are not allowed."""
    if allowed is None:
        return segments
    rows, offsets = segments
    where = rows.to(allowed.device)
    kept = allowed[where] if allowed.ndim == 1 else allowed[owner.to(allowed.device), where]
    kept = kept.to(rows.device)
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return rows[kept], before[offsets]
