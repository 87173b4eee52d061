"""Norm, rotary embedding with append, and the SwiGLU gate on a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.layers import LayerSize, rope_of
from ume_kernels.prefill import rms_norm, rope_append, silu_mul, silu_mul_

pytestmark = [pytest.mark.gpu(dry=True)]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("width", [80, 1536, 3584])
def test_rms_norm(parity, device, dtype, tokens, width):
    x = (3 * torch.randn(tokens, width, device=device)).to(dtype)
    weight = (1 + 0.2 * torch.randn(width, device=device)).to(dtype)
    got = rms_norm(x, weight, 1e-6, backend="triton")
    eager = rms_norm(x, weight, 1e-6, backend="torch")
    wide = x.float()
    truth = weight.float() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    parity.check(got, eager, truth)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 8), (5, 96), (129, 8960)])
def test_silu_mul(parity, device, dtype, shape):
    gate, up = torch.randn(2, *shape, device=device).to(dtype).unbind(0)
    truth = torch.nn.functional.silu(gate.float()) * up.float()
    eager = silu_mul(gate, up, backend="torch")
    parity.check(silu_mul(gate, up, backend="triton"), eager, truth)
    into = gate.clone()
    silu_mul_(into, up, backend="triton")
    parity.check(into, eager, truth)


@torch.no_grad()
@pytest.mark.parametrize("heads", [(12, 2), (28, 4), (3, 3)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_rope_append(parity, device, dtype, dim, heads):
    size = LayerSize(dim, dim, heads[0], heads[1], dim)
    counts, capacity = [11, 1, 30], 40
    tokens = sum(counts)
    slots = torch.repeat_interleave(torch.tensor([2, 0, 1]), torch.tensor(counts)).to(device)
    positions = torch.cat([torch.arange(n) + s for n, s in zip(counts, (5, 39, 0), strict=True)])
    positions = positions.to(device)
    q = torch.randn(tokens, size.heads, dim, device=device).to(dtype)
    k, v = torch.randn(2, tokens, size.kv_heads, dim, device=device).to(dtype).unbind(0)
    cos, sin = (t[positions] for t in rope_of(size, capacity, device))
    empty = torch.full((2, 3, size.kv_heads, capacity, dim), float("nan"), device=device)

    def run(kind, backend):
        keys, values = empty.to(kind).unbind(0)
        low = [t.to(kind) for t in (q, k, v)]
        out = rope_append(*low, cos, sin, keys, values, slots, positions, backend=backend)
        return out, keys, values

    results = [run(dtype, "triton"), run(dtype, "torch"), run(torch.float32, "torch")]
    parity.check(*[r[0] for r in results], what="queries")
    new = torch.zeros(3, capacity, dtype=torch.bool, device=device)
    new[slots, positions] = True
    for index, name in ((1, "keys"), (2, "values")):
        caches = [r[index].transpose(1, 2) for r in results]
        if name == "values":
            assert torch.equal(caches[0][new], v[torch.argsort(slots * capacity + positions)])
        else:
            parity.check(*[c[new] for c in caches], what=name)
        assert bool(caches[0][~new].isnan().all()), f"{name}: something else was written"
