"""One check per operation at published sizes: what a GPU session runs before it measures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.layers import SIZES, converted, random_layer, step_of
from ume_kernels import MoETransition, decode_layer, moe_transition

pytestmark = pytest.mark.gpu(dry=True)


@pytest.fixture
def dtype(dry_run):
    return torch.float32 if dry_run else torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 64])
def test_adapter(parity, device, dtype, dry_run, rows):
    width = 64 if dry_run else 1536
    module = MoETransition(width).to(device, dtype)
    wide = MoETransition(width).to(device)
    wide.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    z, context = torch.randn(2, rows, width, device=device).to(dtype).unbind(0)
    args = (z, context, 3, module.weights(), 2)
    got = moe_transition(*args, backend="triton")[0]
    eager = moe_transition(*args, backend="torch")[0]
    truth = moe_transition(z.float(), context.float(), 3, wide.weights(), 2, backend="torch")[0]
    # A near tie between experts may fall either way in low precision: compare the other rows.
    same = ((eager.float() - truth).norm(dim=-1) < 0.05 * truth.norm(dim=-1)) & (
        (got.float() - truth).norm(dim=-1) < 0.05 * truth.norm(dim=-1)
    )
    assert int(same.sum()) >= 0.8 * rows
    parity.check(got[same], eager[same], truth[same])


@torch.no_grad()
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (1, 6), (32, 1), (64, 6)])
def test_decode_layer(parity, device, dtype, dry_run, batch, queries):
    size = SIZES["tiny" if dry_run else "qwen2-vl-2b"]
    batch = min(batch, 3) if dry_run else batch
    capacity = 24 if dry_run else 512
    weights = random_layer(size, device, dtype)
    lengths = torch.randint(0, capacity - queries + 1, (batch,), device=device)
    keys, values = torch.randn(
        2, batch, size.kv_heads, capacity, size.head_dim, device=device
    ).to(dtype).unbind(0)
    x = torch.randn(batch, queries, size.width, device=device).to(dtype)

    def run(kind, backend):
        step = step_of(size, lengths, queries, capacity, kind)
        layer = converted(weights, kind)
        k, v = keys.to(kind, copy=True), values.to(kind, copy=True)
        return decode_layer(x.to(kind), step, k, v, layer, size.shape, backend=backend)

    parity.check(run(dtype, "triton"), run(dtype, "torch"), run(torch.float32, "torch"))
