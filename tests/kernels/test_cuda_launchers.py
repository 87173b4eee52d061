"""The Python launchers of the CUDA C++ kernels, over the emulated kernels and CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ume_kernels import cuda_backend, native
from ume_kernels.contrastive_loss import blocked
from ume_kernels.contrastive_loss import cuda as loss
from ume_kernels.contrastive_loss.pairs import Pairs, inverse_norms
from ume_kernels.similarity_topk import cuda as search
from ume_kernels.similarity_topk.keys import empty_keys, pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import emulated

Tensor = torch.Tensor
ROW_BYTES = 64


class EmulatedModule:
    """What the launchers call in ``ume_kernels._C``; counts the strips."""

    TOPK_CAPACITY_CUDA = 512

    def __init__(self) -> None:
        self.kernels = emulated.kernels("sm80")
        self.launches = 0

    @staticmethod
    def _scores(q: Any, p: Any, q_inv: int, p_inv: int, scale: int, offset: int, pairs: list[int]):
        assert q[1] == p[1] and q[3] == p[3]
        return emulated.Scores(
            q[0], p[0], q[1], q[2], p[2], q[3], q[4], p[4], q_inv, p_inv, scale, offset, *pairs
        )

    def contrastive_workspace_cuda(self, rows: int, *sizes: object) -> int:
        return rows * ROW_BYTES

    def contrastive_forward_cuda(self, *arguments: Any) -> None:
        *scores, outputs, _ = arguments
        self.launches += 1
        emulated.call(
            self.kernels.contrastive_forward, self._scores(*scores), emulated.Forward(*outputs)
        )

    def contrastive_finish_columns_cuda(self, sums: int, lse: int, n: int, stream: int) -> None:
        pointer = ctypes.c_void_p
        self.kernels.contrastive_finish_columns(pointer(sums), pointer(lse), ctypes.c_int64(n))

    def contrastive_gradient_cuda(self, *arguments: Any) -> None:
        *scores, inputs, u, stride, _ = arguments
        self.launches += 1
        gradients = emulated.Gradients(*inputs, u, stride)
        emulated.call(self.kernels.contrastive_gradient, self._scores(*scores), gradients)

    def similarity_topk_blocks_cuda(self) -> int:
        return 2

    def similarity_topk_cuda(self, q: Any, c: Any, *rest: Any) -> None:
        *values, _ = rest
        q_inv, c_inv, *others = values
        self.launches += 1
        problem = emulated.Topk(
            q[0], c[0], q[1], q[2], c[2], q[3], q[4], c[4], q_inv, c_inv, *others
        )
        emulated.call(self.kernels.similarity_topk, problem)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> EmulatedModule:
    fake = EmulatedModule()
    monkeypatch.setattr(native, "require", lambda: fake)
    monkeypatch.setattr(cuda_backend, "stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    return fake


def problem(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Pairs]:
    g = torch.Generator().manual_seed(n)
    q = torch.randn(n, 24, generator=g).to(dtype)
    p = torch.randn(m, 24, generator=g).to(dtype)
    ignored = torch.rand(n, m, generator=g) < 0.05
    start = torch.zeros(n + 1, dtype=torch.int64)
    start[1:] = ignored.sum(1).cumsum(0)
    pairs = Pairs(
        offset=-2,
        row_mask=torch.rand(n, generator=g) < 0.9,
        col_mask=torch.rand(m, generator=g) < 0.9,
        row_group=torch.randint(0, 2, (n,), generator=g, dtype=torch.int32),
        col_group=torch.randint(0, 2, (m,), generator=g, dtype=torch.int32),
        ignore_start=start,
        ignore_col=ignored.nonzero()[:, 1].int(),
        row_limit=torch.rand(n, generator=g) * 20,
        col_limit=torch.rand(m, generator=g) * 20,
    )
    return q, p, pairs


@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
def test_loss(
    module: EmulatedModule, monkeypatch: pytest.MonkeyPatch, strips: int, columns: bool
) -> None:
    n, m = 300, 140
    if strips > 1:
        monkeypatch.setattr(loss, "MIN_PARTIALS", 1)
        monkeypatch.setattr(loss, "MIN_FACTORS", 1)
        monkeypatch.setattr(
            module, "contrastive_workspace_cuda", lambda rows, *sizes: rows * (n + m) * 24
        )
    q, p, pairs = problem(n, m, torch.bfloat16)
    q_inv, p_inv, scale = inverse_norms(q), inverse_norms(p), torch.tensor(20.0)
    found = loss.forward(q, p, q_inv, p_inv, scale, pairs, columns, columns)
    truth = blocked.forward(q, p, q_inv, p_inv, scale, pairs, columns, columns)
    assert module.launches == strips
    for name, a, b in zip(found._fields, found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)

    g_row, g_pos = torch.rand(n), -torch.rand(n)
    g_col = torch.rand(m) if columns else None
    arguments = (q, p, q_inv, p_inv, scale, pairs, truth.row_lse, truth.col_lse,
                 g_row, g_col, g_pos)  # fmt: skip
    gradients = loss.backward(*arguments)
    assert module.launches == 2 * strips
    for name, a, b in zip(("dq", "dp", "dscale"), gradients, blocked.backward(*arguments),
                          strict=True):  # fmt: skip
        assert a.dtype == b.dtype
        assert float((a - b).norm() / b.norm()) < 1e-2, name


def test_scale_of_zero_has_a_gradient(module: EmulatedModule) -> None:
    q, p = torch.randn(2, 20, 16).half().unbind(0)
    zero, ones = torch.tensor(0.0), torch.ones(20)
    lse = blocked.forward(q, p, None, None, zero, Pairs(), True, False)
    arguments = (q, p, None, None, zero, Pairs(), lse.row_lse, lse.col_lse, ones, ones, -ones)
    dq, _, dscale = loss.backward(*arguments)
    s = q.double() @ p.double().T
    expected = s.mean() * 20 + s.mean() * 20 - s.diagonal().sum()
    assert not bool(dq.any())
    torch.testing.assert_close(dscale.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [0, 1, 2], ids=["all", "mask", "mask per query"])
def test_search(
    module: EmulatedModule, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: int
) -> None:
    monkeypatch.setattr(search, "QUERY_BLOCK", 128)
    monkeypatch.setattr(search, "CANDIDATE_BLOCK", 512)
    g = torch.Generator().manual_seed(1)
    q = torch.randint(-2, 3, (130, 16), generator=g).to(dtype)
    c = torch.randint(-2, 3, (1100, 16), generator=g).to(dtype)
    allowed = torch.rand((130, 1100)[2 - masked :], generator=g) < 0.6 if masked else None
    everything = pack(q.float() @ c.float().T, torch.arange(1100) + 30)
    earlier = pack(torch.full((130, 1), 3.0), torch.arange(2, 7))
    keys = torch.cat([earlier, empty_keys(130, 2, q.device)], dim=1)
    found, invalid = search.scan(q, c, 30, keys, allowed=allowed)
    if allowed is not None:
        everything = everything.masked_fill(~allowed, -(2**63))
    expected = torch.cat([keys, everything], dim=1).topk(7, dim=1).values
    assert not bool(invalid)
    assert torch.equal(found.sort(dim=1, descending=True).values, expected)
    assert module.launches == 6  # two blocks of queries, three of candidates


def test_search_scales_and_reports_nan(module: EmulatedModule) -> None:
    q, c = torch.ones(2, 8).half(), torch.ones(3, 8).half()
    factors = torch.tensor([1.0, 3.0, 2.0])
    keys = empty_keys(2, 1, q.device)
    halves = torch.full((2,), 0.5)
    found, _ = search.scan(q, c, 0, keys, q_inv=halves, c_inv=factors)
    assert torch.equal(found, pack(torch.tensor([[12.0]] * 2), torch.tensor([1])))
    factors[0] = torch.nan
    _, invalid = search.scan(q, c, 0, keys, q_inv=halves, c_inv=factors)
    assert bool(invalid)
    with pytest.raises(ValueError, match="at most 128"):
        search.scan(q, c, 0, empty_keys(2, 129, q.device))


@pytest.mark.parametrize("places", [1, 6, 132, 264])
@pytest.mark.parametrize("blocks", [1, 3, 8, 100, 128])
def test_splits_fill_the_gpu(places: int, blocks: int) -> None:
    splits = search.count_splits(blocks, 10**6, places)
    rounds = -(-splits * blocks // places)
    assert splits >= 1
    assert splits == 1 or rounds <= 4
    if places > blocks:
        # At most a fifth idle: what four rounds cannot fill any better.
        assert splits * blocks >= 0.8 * rounds * places
    assert search.count_splits(blocks, 2, places) <= 2


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(3, 12).half(), "12 columns are not a multiple of 8"),
        (torch.zeros(3, 0).half(), "0 columns"),
        (torch.zeros(3, 20).half()[:, :16], "multiples of 16 bytes"),
        (torch.zeros(49).half()[1:].view(3, 16), "multiples of 16 bytes"),
        (torch.zeros(16, 3).half().T, "multiples of 16 bytes"),
        (torch.zeros(16, 1).half().T, None),
        (torch.zeros(3, 24).half()[:, 8:], None),
        (torch.zeros(1, 20).half()[:, :16], None),
        (torch.zeros(0, 8).half(), None),
    ],
)
def test_layouts(tensor: Tensor, reason: str | None) -> None:
    obstacle = cuda_backend.layout(tensor)
    assert (obstacle is None) == (reason is None)
    if obstacle is not None and reason is not None:
        assert reason in obstacle.reason


def test_check_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 8).half()
    monkeypatch.setattr(native, "module", SimpleNamespace(with_cuda=True))
    assert "on cpu" in cuda_backend.check((x, x)).reason
    monkeypatch.setattr(native, "module", SimpleNamespace(with_cuda=False))
    obstacle = cuda_backend.check((x, x))
    assert obstacle.missing == "nvcc"
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "it is not there")
    assert cuda_backend.check(()).reason == "it is not there"
