"""The contrastive log-sum-exp in C++ on the CPU: ``csrc/cpu/contrastive_*``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_kernels import cpu_backend, native
from ume_kernels.contrastive_loss.pairs import LseOutput, Pairs
from ume_kernels.dispatch import Obstacle
from ume_kernels.matrices import ELEMENTS, address, matrix, rows_contiguous

_C = native.module


def check(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    """Why the native kernels cannot run for ``(q, p)``, or None; without tensors, the machine."""
    obstacle = cpu_backend.check(tensors)
    if obstacle is None and native.cpu_isa() == "scalar":
        return cpu_backend.NO_VECTORS
    return obstacle


class _Scores:
    """The C++ view of a score matrix; keeps alive what it points to."""

    def __init__(
        self,
        q: torch.Tensor,
        p: torch.Tensor,
        q_inv: torch.Tensor | None,
        p_inv: torch.Tensor | None,
        scale: torch.Tensor,
        pairs: Pairs,
    ) -> None:
        self.q, self.p = rows_contiguous(q), rows_contiguous(p)
        self._kept = [None if t is None else t.contiguous() for t in (q_inv, p_inv)]
        self._pairs = [None if t is None else t.contiguous() for t in pairs.tensors()]
        self.arguments = (
            matrix(self.q),
            matrix(self.p),
            address(self._kept[0]),
            address(self._kept[1]),
            float(scale),
            pairs.offset,
            [address(t) for t in self._pairs],
        )


def _floats(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32)  # whatever the default dtype is


def forward(
    q: torch.Tensor,
    p: torch.Tensor,
    q_inv: torch.Tensor | None,
    p_inv: torch.Tensor | None,
    scale: torch.Tensor,
    pairs: Pairs,
    columns: bool,
    hardest: bool,
    isa: str | None = None,
) -> LseOutput:
    """Row and column log-sum-exp in one pass; see ``blocked.forward``.

    `isa` names the instruction set, for tests; None is the fastest of this machine.
    """
    assert _C is not None
    scores = _Scores(q, p, q_inv, p_inv, scale, pairs)
    n, m = q.shape[0], p.shape[0]
    out = LseOutput(
        _floats(n),
        _floats(m if columns else 0),
        _floats(n),
        _floats(n if hardest else 0),
        torch.empty(n if hardest else 0, dtype=torch.int64),
    )
    _C.contrastive_forward(
        *scores.arguments,
        out.row_lse.data_ptr(),
        out.col_lse.data_ptr() if columns else 0,
        out.pos.data_ptr(),
        out.hard.data_ptr() if hardest else 0,
        out.hard_index.data_ptr() if hardest else 0,
        torch.get_num_threads(),
        isa,
    )
    return out


def backward(
    q: torch.Tensor,
    p: torch.Tensor,
    q_inv: torch.Tensor | None,
    p_inv: torch.Tensor | None,
    scale: torch.Tensor,
    pairs: Pairs,
    row_lse: torch.Tensor,
    col_lse: torch.Tensor | None,
    g_row: torch.Tensor,
    g_col: torch.Tensor | None,
    g_pos: torch.Tensor,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients ``(dq, dp, dscale)`` from one recomputation of the scores; see ``blocked``."""
    assert _C is not None
    scores = _Scores(q, p, q_inv, p_inv, scale, pairs)
    columns = None if g_col is None else col_lse
    inputs = [
        None if t is None else t.contiguous() for t in (row_lse, columns, g_row, g_col, g_pos)
    ]
    (n, d), m = q.shape, p.shape[0]
    out_dtype = torch.bfloat16 if q.dtype is torch.bfloat16 else torch.float32
    threads = torch.get_num_threads()
    wide = _C.contrastive_dp_columns(ELEMENTS[q.dtype], d, isa)
    dp_sum = torch.zeros(m, wide, dtype=torch.float32)
    dq = torch.empty(n, d, dtype=out_dtype)
    dscale = _floats(n)
    _C.contrastive_backward(
        *scores.arguments,
        [address(t) for t in inputs],
        dq.data_ptr(),
        dp_sum.data_ptr(),
        dscale.data_ptr(),
        threads,
        isa,
    )
    in_place = out_dtype is torch.float32 and wide == d
    dp = dp_sum if in_place else torch.empty(m, d, dtype=out_dtype)
    _C.contrastive_finish(*scores.arguments, dp_sum.data_ptr(), dp.data_ptr(), threads, isa)
    return dq.to(q.dtype), dp.to(p.dtype), dscale.sum(dtype=torch.float64).float()
