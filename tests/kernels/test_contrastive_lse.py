"""The pass under the contrastive loss, where the loss itself does not lead: blocks of columns."""

from __future__ import annotations

import math

import pytest
import torch

import ume_kernels
from ume_kernels.contrastive_loss import blocked
from ume_kernels.contrastive_loss.lse import NAME, backward, forward
from ume_kernels.contrastive_loss.pairs import Pairs, inverse_norms
from ume_kernels.contrastive_loss.prepare import slice_columns
from ume_kernels.dispatch import BackendError


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    x = torch.zeros(1, 1)
    try:
        ume_kernels.explain(NAME, x, x, backend=request.param)
    except BackendError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE_CPU", (4, 3))


def matrices(n: int, m: int, d: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(rows, d, generator=generator) for rows in (n, m)]


def test_a_positive_outside_the_columns_has_no_score(backend: str) -> None:
    # As in a block of columns of the distributed loss: rows before, in and after it.
    q, p = matrices(9, 4, 8)
    scale = torch.tensor(2.0)
    scores = 2.0 * q @ p.T
    for offset in (-12, -3, -1, 2, 4):
        pairs = Pairs(offset)
        out = forward(
            q, p, scale, pairs, normalize=False, columns=False, hardest=True, backend=backend
        )
        expected = torch.full((9,), -torch.inf)
        rivals = scores.clone()
        for i in range(9):
            if 0 <= i + offset < 4:
                expected[i] = scores[i, i + offset]
                rivals[i, i + offset] = -torch.inf
        torch.testing.assert_close(out.pos, expected)
        torch.testing.assert_close(out.row_lse, scores.logsumexp(1))
        assert out.hard_index.tolist() == rivals.argmax(1).tolist()
        g_row, g_pos = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).unbind(0)
        weights = g_row[:, None] * scores.softmax(1)
        for i in range(9):
            if 0 <= i + offset < 4:
                weights[i, i + offset] += g_pos[i]
        dq, dp, dscale = backward(
            q, p, scale, pairs, out.row_lse, out.col_lse, g_row, None, g_pos,
            normalize=False, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(dq, 2 * weights @ p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dp, 2 * weights.T @ q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dscale, (weights * scores).sum() / 2, rtol=1e-4, atol=1e-5)


def test_rows_without_any_pair_add_nothing(backend: str) -> None:
    q, p = matrices(3, 4, 4)
    groups = torch.tensor([0, 1, 2], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    pairs = Pairs(4, row_group=groups[0], col_group=groups[1])
    scale = torch.tensor(1.0)
    out = forward(q, p, scale, pairs, normalize=False, columns=True, hardest=True, backend=backend)
    assert out.row_lse[1:].tolist() == [-math.inf] * 2
    assert out.hard_index[1:].tolist() == [-1, -1]
    dq, dp, _ = backward(
        q, p, scale, pairs, out.row_lse, out.col_lse,
        torch.tensor([1.0, 0.0, 0.0]), torch.zeros(4), torch.zeros(3),
        normalize=False, backend=backend,
    )  # fmt: skip
    assert torch.equal(dq[1:], torch.zeros(2, 4))
    assert bool(dq.isfinite().all() and dp.isfinite().all())


def test_gradients_may_be_expanded_numbers(backend: str) -> None:
    # That of a sum is one number with stride 0; kernels go by addresses.
    q, p = matrices(5, 6, 4)
    scale, pairs = torch.tensor(2.0), Pairs(0)
    out = forward(q, p, scale, pairs, normalize=True, columns=True, backend=backend)
    results = []
    for vector in (torch.full((5,), 0.5), torch.tensor(0.5).expand(5)):
        col = torch.full((6,), 0.25) if vector.is_contiguous() else torch.tensor(0.25).expand(6)
        results.append(
            backward(
                q, p, scale, pairs, out.row_lse, out.col_lse, vector, col, -vector,
                normalize=True, backend=backend,
            )
        )  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_blocks_of_columns_merge_into_the_whole(backend: str) -> None:
    q, p = matrices(7, 11, 5)
    generator = torch.Generator().manual_seed(1)
    whole = Pairs(
        2,
        col_mask=torch.rand(11, generator=generator) < 0.8,
        row_group=torch.randint(2, (7,), generator=generator, dtype=torch.int32),
        col_group=torch.randint(2, (11,), generator=generator, dtype=torch.int32),
        ignore_start=torch.tensor([0, 2, 2, 3, 3, 3, 6, 6]),
        ignore_col=torch.tensor([1, 9, 0, 0, 5, 10], dtype=torch.int32),
        row_limit=torch.full((7,), 1.0),
        col_limit=torch.full((11,), 1.0),
    )
    scale = torch.tensor(2.0)
    expected = forward(q, p, scale, whole, normalize=True, columns=True, backend=backend)
    merged, positive = torch.full((7,), -math.inf), torch.full((7,), -math.inf)
    col_lse = []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        part = forward(
            q, p[start:stop], scale, slice_columns(whole, start, stop),
            normalize=True, columns=True, backend=backend,
        )  # fmt: skip
        merged = torch.logaddexp(merged, part.row_lse)
        positive = torch.maximum(positive, part.pos)
        col_lse.append(part.col_lse)
    torch.testing.assert_close(merged, expected.row_lse)
    torch.testing.assert_close(positive, expected.pos)
    torch.testing.assert_close(torch.cat(col_lse), expected.col_lse)


def test_norms_below_the_smallest_divide_by_it() -> None:
    double = torch.float64
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-14, 0.0]], dtype=double)
    torch.testing.assert_close(inverse_norms(x), torch.tensor([1e12, 0.2, 1e12], dtype=double))
    q = x.clone().requires_grad_()
    p = torch.tensor([[1.0, 2.0], [0.5, 1.0], [1.0, -1.0]], dtype=double)
    loss = ume_kernels.contrastive_loss(q, p, scale=2.0, backend="torch")
    expected = q.detach().clone().requires_grad_()
    reference = torch.nn.functional.normalize(expected, dim=-1)
    scores = 2.0 * reference @ torch.nn.functional.normalize(p, dim=-1).T
    labels = torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    plain = (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(loss, q)[0], torch.autograd.grad(plain, expected)[0]
    )
