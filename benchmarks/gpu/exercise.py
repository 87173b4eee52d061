"""``python -m benchmarks.gpu.exercise``: every kernel once or twice on small inputs.

For compute-sanitizer, which runs kernels a hundred times slower. On a CPU, with
``TRITON_INTERPRET=1``, it is part of a dry run.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.layers import SIZES, random_layer, rope_of, step_of
from ume_kernels import MoETransition, decode_layer, moe_transition
from ume_kernels.contrastive_loss import contrastive_loss
from ume_kernels.decode import attend_cache
from ume_kernels.prefill import rms_norm, rope_append, silu_mul
from ume_kernels.similarity_topk import similarity_topk


def adapter(device: torch.device, dtype: torch.dtype) -> None:
    """Forward at few and at many rows, and backward."""
    module = MoETransition(64).to(device, dtype)
    for rows in (1, 3, 37):
        z, context = torch.randn(2, rows, 64, device=device).to(dtype).unbind(0)
        step = torch.arange(rows, device=device)
        weights = module.weights()
        with torch.no_grad():
            moe_transition(z, context, step, weights, 2, backend="triton")
        z.requires_grad_()
        y, aux = moe_transition(z, None, 2, weights, 2, backend="triton")
        (y.float().sum() + aux["balance_loss"] + aux["router_entropy"]).backward()


@torch.no_grad()
def decode(device: torch.device, dtype: torch.dtype) -> None:
    """A layer at 1 and 6 new tokens per row, rows of length 0 up to a full arena."""
    size = SIZES["tiny"]
    weights = random_layer(size, device, dtype)
    for batch, queries in ((1, 1), (3, 6), (19, 1)):
        capacity = 70
        lengths = torch.randint(0, capacity - queries + 1, (batch,), device=device)
        lengths[0] = capacity - queries
        if batch > 1:
            lengths[1] = 0
        keys, values = (
            torch.randn(2, batch, size.kv_heads, capacity, size.head_dim, device=device)
            .to(dtype)
            .unbind(0)
        )
        x = torch.randn(batch, queries, size.width, device=device).to(dtype)
        step = step_of(size, lengths, queries, capacity, dtype)
        decode_layer(x, step, keys, values, weights, size.shape, backend="triton")
        q = torch.randn(2, queries, size.heads, size.head_dim, device=device).to(dtype)
        slots = torch.tensor([batch - 1, 0], device=device)
        attend_cache(q, keys, values, slots, lengths[slots] + 1, backend="triton")


@torch.no_grad()
def prefill(device: torch.device, dtype: torch.dtype) -> None:
    """The operations of a packed prefill on an odd number of tokens."""
    size, tokens = SIZES["tiny"], 13
    x = torch.randn(tokens, size.width, device=device).to(dtype)
    rms_norm(x, torch.ones(size.width, device=device, dtype=dtype), 1e-6, backend="triton")
    silu_mul(x, x.flip(0).contiguous(), backend="triton")
    q = torch.randn(tokens, size.heads, size.head_dim, device=device).to(dtype)
    k, v = torch.randn(2, tokens, size.kv_heads, size.head_dim, device=device).to(dtype).unbind(0)
    cos, sin = rope_of(size, tokens, device)
    arena = torch.zeros(2, 2, size.kv_heads, 16, size.head_dim, device=device, dtype=dtype)
    keys, values = arena.unbind(0)
    slots = torch.tensor([0] * 7 + [1] * 6, device=device)
    positions = torch.tensor([*range(7), *range(6)], device=device)
    rope_append(q, k, v, cos, sin, keys, values, slots, positions, backend="triton")


def similarity(device: torch.device, dtype: torch.dtype) -> None:
    """Loss with every condition, forward and backward, and top-k, by each kind of kernel."""
    # more than one tile of rows and columns; the interpreter is content with one
    n, m, width = (133, 150, 72) if device.type == "cuda" else (30, 40, 24)
    q, p = (torch.randn(rows, width, device=device).to(dtype) for rows in (n, m))
    ignored = torch.tensor([[0, 3], [0, 5], [7, 30]], device=device)
    valid = torch.rand(m, device=device) < 0.9
    groups = torch.arange(m, device=device) // 20
    for backend in ("cuda", "triton") if device.type == "cuda" else ("triton",):
        a, b = q.clone().requires_grad_(), p.clone().requires_grad_()
        contrastive_loss(a, b, backend=backend).backward()
        loss, _ = contrastive_loss(
            a, b, valid=valid, groups=groups, ignore=(ignored, 0.1), row_offset=2,
            return_stats=True, backend=backend,
        )  # fmt: skip
        loss.backward()
        order = torch.argsort(p @ q[0])  # ascending for one query: its list is compacted often
        similarity_topk(q, p[order].repeat(5, 1), 17, backend=backend)


def main() -> None:
    """Run everything; an exception or a device fault ends the process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16) if on_gpu else (torch.float32,):
        for part in (adapter, decode, prefill, similarity):
            part(device, dtype)
    if on_gpu:
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
