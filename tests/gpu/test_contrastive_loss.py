"""The contrastive loss on a GPU: both kinds of kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ume_kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference

pytestmark = [pytest.mark.gpu(dry=True)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, dry_run: bool) -> str:
    if dry_run and request.param == "cuda":
        pytest.skip("CUDA C++ has no dry run here; tests/emulator runs it on a CPU")
    return str(request.param)


def usual(q, p, scale=50.0, bidirectional=True, reduction="none"):
    """What training code does in this dtype; only the cross-entropy is taken in float32."""
    scores = (scale * F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T).float()
    labels = torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(scores, labels, reduction=reduction)
    if bidirectional:
        loss = (loss + F.cross_entropy(scores.T, labels, reduction=reduction)) / 2
    return loss


def run(loss, q, p, **options):
    a, b = q.clone().requires_grad_(), p.clone().requires_grad_()
    value = loss(a, b, **options)
    return [value.detach(), *torch.autograd.grad(value.mean(), (a, b))]


@pytest.mark.parametrize("shape", [(66, 8), (130, 64), (700, 200), (300, 1536)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"scale": 5.0}])
def test_loss_and_gradients(parity, device, dtype, backend, shape, options, dry_run):
    if dry_run and shape[1] > 64:
        pytest.skip("takes too long in the interpreter")
    q = torch.randn(shape, device=device).to(dtype)
    # The losses row by row: one number's error may be small by chance.
    options = {**options, "reduction": "none"}
    # far enough apart for a loss that is not rounding alone
    p = (0.1 * q.float() + torch.randn(shape, device=device)).to(dtype)
    got = run(contrastive_loss, q, p, backend=backend, **options)
    eager = run(usual, q, p, **options)
    truth = run(contrastive_loss_reference, q.double(), p.double(), **options)
    for name, a, b, c in zip(("loss", "dq", "dp"), got, eager, truth, strict=True):
        parity.check(a.to(b.dtype), b, c, name)


def test_every_condition(device, dtype, backend):
    n, m, width = 70, 90, 64
    q, p = (torch.randn(rows, width, device=device) for rows in (n, m))
    p[4 : 4 + n] = q + 0.5 * p[4 : 4 + n]
    p[74:84] = q[:10] + 0.3 * p[74:84]  # false negatives, clearly on one side of the margin
    q, p = q.to(dtype), p.to(dtype)
    options = {
        "valid": torch.rand(m, device=device) < 0.8,
        "groups": torch.arange(m, device=device) % 2,
        "ignore": (torch.tensor([[0, 9], [3, 30]], device=device), 0.2),
        "scale": 10.0,
        "row_offset": 4,
        "extra_negatives": torch.randn(6, width, device=device).to(dtype),
    }
    got = run(contrastive_loss, q, p, backend=backend, **options)
    truth = run(contrastive_loss_reference, q.double(), p.double(), **{
        **options, "extra_negatives": options["extra_negatives"].double()
    })  # fmt: skip
    for a, b in zip(got, truth, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


def test_twice_the_same_bits(device, dtype, backend):
    q, p = torch.randn(2, 300, 64, device=device).to(dtype).unbind(0)
    first = run(contrastive_loss, q, p, backend=backend)
    again = run(contrastive_loss, q, p, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
