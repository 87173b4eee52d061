"""What a caller of the contrastive loss may ask for, checked and in one normal form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from ume_kernels.scalars import plain

Tensor = torch.Tensor

Mask = Tensor | tuple[Tensor, Tensor]
"""One tensor for rows and columns, or one for each."""

Ignore = Tensor | float | tuple[Tensor | None, float | None]
"""Pairs ``[E, 2]``, a margin, or both."""

Reduction = Literal["mean", "sum", "none"]

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT32_MAX = 3.4028234663852886e38
_INT32_MAX = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Selection:
    """Which rows and columns there are for whom: one tensor per side, or None.

    Attributes:
        row_valid, col_valid: bool ``[N]``, ``[M]``; both or none.
        row_group, col_group: integers ``[N]``, ``[M]``; both or none.
        ignore: int64 ``[E, 2]`` of (row, column).
        margin: candidates that score above positive - margin, before scaling, are dropped.
    """

    row_valid: Tensor | None = None
    col_valid: Tensor | None = None
    row_group: Tensor | None = None
    col_group: Tensor | None = None
    ignore: Tensor | None = None
    margin: float | None = None


def check_matrices(q: Any, p: Any) -> None:
    """Raise for shapes, dtypes and devices that do not fit each other."""
    for name, tensor in (("q", q), ("p", p)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}"
            )
    if q.shape[1] != p.shape[1]:
        raise ValueError(f"q has {q.shape[1]} columns and p has {p.shape[1]}: they must agree")
    if q.shape[1] == 0:
        raise ValueError("q and p have no columns: nothing to compare")
    if q.dtype != p.dtype:
        raise TypeError(f"q is {q.dtype} and p is {p.dtype}: they must agree")
    if q.device != p.device:
        raise ValueError(f"q is on {q.device} and p on {p.device}: they must be on one device")
    if max(q.shape[0], p.shape[0]) > _INT32_MAX:
        raise ValueError(f"at most {_INT32_MAX} rows are supported, got {tuple(p.shape)}")


def check_no_tangent(*inputs: object) -> None:
    """Refuse forward-mode differentiation, whose tangents an operator would drop silently."""
    if torch.compiler.is_compiling():
        return
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "contrastive_loss has no forward-mode derivative: use its backward, or "
                "contrastive_loss_reference"
            )


def check_sizes(n: int, m: int, row_offset: Any) -> None:
    """Raise for empty sides and positives that do not exist."""
    if not isinstance(row_offset, (int, torch.SymInt)) or isinstance(row_offset, bool):
        raise TypeError(f"row_offset must be an int, got {row_offset!r}")
    if n == 0 or m == 0:
        raise ValueError(f"q has {n} rows and p has {m}: both need at least one")
    if row_offset < 0 or n + row_offset > m:
        raise ValueError(
            f"the positive of row i is column i + row_offset: {n} rows from column {row_offset} "
            f"on do not fit into {m} columns"
        )


def check_options(scale: Any, reduction: Any) -> None:
    """Raise for a scale or a reduction that cannot be used."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be a float or a floating 0-d tensor, got {scale.dtype} of shape "
                f"{tuple(scale.shape)}"
            )
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a float or a 0-d tensor, got a {type(scale).__name__}")
    elif not 0 < scale <= _FLOAT32_MAX:
        raise ValueError(f"scale must be positive and finite in float32, got {scale}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def select_pairs(
    valid: Any, groups: Any, ignore: Any, n: int, m: int, offset: int, device: torch.device
) -> Selection:
    """The normal form of the masks; raises for what does not fit N rows and M columns."""
    row_valid, col_valid = _sides("valid", valid, n, m, offset, device, (torch.bool,))
    row_group, col_group = _sides("groups", groups, n, m, offset, device, _INTEGERS)
    listed, margin = split_ignore(ignore, device)
    return Selection(row_valid, col_valid, row_group, col_group, listed, margin)


def _sides(
    name: str,
    given: Any,
    n: int,
    m: int,
    offset: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    if given is None:
        return None, None
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if len(pair) not in (1, 2) or not all(isinstance(t, Tensor) for t in pair):
        raise TypeError(f"{name} must be a tensor or a pair (rows, columns) of tensors")
    for tensor in pair:
        if tensor.dtype not in dtypes:
            kind = "bool" if dtypes == (torch.bool,) else "integers"
            raise TypeError(f"{name} must be {kind}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q and p on {device}")
    shapes = [tuple(t.shape) for t in pair]
    if len(pair) == 2:
        if shapes != [(n,), (m,)]:
            raise ValueError(
                f"{name} must be a pair of shapes [{n}] (rows) and [{m}] (columns), got {shapes}"
            )
        return pair[0], pair[1]
    if shapes != [(m,)]:
        raise ValueError(
            f"{name} must be [{m}], one per column, or a pair (rows, columns), got {shapes[0]}"
        )
    return pair[0][offset : offset + n], pair[0]


def split_ignore(ignore: Any, device: torch.device) -> tuple[Tensor | None, float | None]:
    """``(pairs, margin)`` of the argument `ignore`."""
    pairs: Any = None
    margin: Any = None
    if isinstance(ignore, tuple):
        if len(ignore) != 2:
            raise TypeError(f"ignore as a tuple is (pairs, margin), got {len(ignore)} elements")
        pairs, margin = ignore
    elif isinstance(ignore, Tensor):
        pairs = ignore
    else:
        margin = ignore
    if pairs is not None:
        if not isinstance(pairs, Tensor) or pairs.dtype is not torch.int64:
            what = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
            raise TypeError(f"the pairs of ignore must be an int64 tensor [E, 2], got {what}")
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"the pairs of ignore must be [E, 2], got {tuple(pairs.shape)}")
        if pairs.device != device:
            raise ValueError(f"the pairs of ignore are on {pairs.device}, q and p on {device}")
    if margin is not None:
        margin = plain(margin)
        number = isinstance(margin, (int, float, torch.SymFloat)) and not isinstance(margin, bool)
        if not number:
            raise TypeError(
                "ignore must be pairs [E, 2], a float margin or a tuple of both, got a "
                f"{type(margin).__name__}"
            )
        if not -_FLOAT32_MAX <= margin <= _FLOAT32_MAX:
            raise ValueError(f"the margin of ignore must be finite, got {margin}")
        margin = margin * 1.0
    return pairs, margin


def check_extra(extra: Any, q: Tensor) -> None:
    """Raise unless `extra` is ``[H, D]`` or ``[N, H, D]`` like q."""
    if not isinstance(extra, Tensor):
        raise TypeError(f"extra_negatives must be a tensor, got a {type(extra).__name__}")
    n, d = q.shape
    fits = extra.ndim == 2 or (extra.ndim == 3 and extra.shape[0] == n)
    if not fits or extra.shape[-1] != d:
        raise ValueError(
            f"extra_negatives must be [H, {d}] for all queries or [{n}, H, {d}], one set each, "
            f"got {tuple(extra.shape)}"
        )
    if extra.shape[-2] == 0:
        raise ValueError("extra_negatives is empty; leave it out instead")
    if extra.dtype != q.dtype:
        raise TypeError(f"extra_negatives is {extra.dtype} and q is {q.dtype}: they must agree")
    if extra.device != q.device:
        raise ValueError(f"extra_negatives is on {extra.device}, q on {q.device}")
