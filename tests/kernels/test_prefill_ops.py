"""Norm, rotary + cache append and SwiGLU gate: Triton's interpreter against the definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_kernels import dispatch
from ume_kernels.dispatch import BackendError
from ume_kernels.prefill import op, rms_norm, rope_append, silu_mul, silu_mul_
from ume_kernels.triton_backend import interpreting

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not interpreting(), reason="tests/gpu has the compiled kernels"),
]

DTYPES = {torch.float32: (1e-6, 1e-6), torch.float16: (1e-3, 1e-3)}

few = settings(max_examples=settings.default.max_examples // 2)
dtypes = st.sampled_from(list(DTYPES))
seeds = st.integers(0, 99)


def close(got, expected):
    rtol, atol = DTYPES[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@few
@given(
    lead=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    width=st.sampled_from([1, 3, 16, 48, 130, 257]),
    dtype=dtypes,
    strided=st.booleans(),
    seed=seeds,
)
def test_rms_norm(lead, width, dtype, strided, seed):
    torch.manual_seed(seed)
    x = torch.randn(*lead, 2 * width, dtype=dtype) * 3
    x = x[..., :width] if strided else x[..., ::2]
    weight = torch.randn(width, dtype=dtype)
    got = rms_norm(x, weight, 1e-6, backend="triton")
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    close(got, weight * normed.to(dtype))
    close(rms_norm(x, weight, 1e-6, backend="torch"), got)


@few
@given(
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([16, 48, 64, 80, 96, 112, 128]),
    wide_table=st.booleans(),
    table_dtype=st.sampled_from([None, torch.float32]),
    dtype=dtypes,
    seed=seeds,
)
def test_rope_append(rows, kv_heads, group, dim, wide_table, table_dtype, dtype, seed):
    """Strided q, k, v; every token's rotation and place written out as a loop."""
    torch.manual_seed(seed)
    tokens, heads = sum(rows), kv_heads * group
    packed = torch.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    parts = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    q, k, v = (p.view(tokens, p.shape[1] // dim, dim) for p in parts)
    angles = torch.rand(tokens, dim if wide_table else dim // 2) * 6
    cos, sin = (t.to(table_dtype or dtype) for t in (angles.cos(), angles.sin()))
    slots = torch.tensor([s for s, n in enumerate(rows) for _ in range(n)], dtype=torch.int64)
    positions = torch.tensor([2 + i for n in rows for i in range(n)], dtype=torch.int64)
    arena = torch.full((2, len(rows), kv_heads, 16, dim), 7.0, dtype=dtype)
    keys, values = arena.unbind(0)
    got = rope_append(q, k, v, cos, sin, keys, values, slots, positions, backend="triton")

    expected_arena, expected = torch.full_like(arena, 7.0), torch.empty_like(got)
    half = dim // 2
    for t in range(tokens):
        c, s = cos[t].to(dtype), sin[t].to(dtype)
        c, s = (c, s) if wide_table else (c.repeat(2), s.repeat(2))

        def rotated(x, c=c, s=s):
            return x * c + torch.cat([-x[half:], x[:half]]) * s

        for h in range(heads):
            expected[t, h] = rotated(q[t, h])
        for h in range(kv_heads):
            expected_arena[0, slots[t], h, positions[t]] = rotated(k[t, h])
            expected_arena[1, slots[t], h, positions[t]] = v[t, h]
    close(got, expected)
    close(arena, expected_arena)
    torch_arena = torch.full_like(arena, 7.0)
    close(rope_append(q, k, v, cos, sin, *torch_arena, slots, positions, backend="torch"), got)
    close(torch_arena, arena)


def test_a_token_outside_of_the_arena_writes_nothing():
    q = torch.ones(4, 2, 16)
    k = v = torch.ones(4, 1, 16)
    cos = sin = torch.ones(4, 8)
    arena = torch.zeros(2, 3, 1, 5, 16)
    slots = torch.tensor([0, 3, 1, -1])
    positions = torch.tensor([5, 0, -1, 0])
    # slot 1 of three is a view, so that a stray write would land in its neighbours
    from ume_kernels.prefill.triton_kernels import rope_append_triton  # as on a device: no look

    rope_append_triton(q, k, v, cos, sin, *arena[:, 1:2], slots, positions)
    assert not arena.any()


@few
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    width=st.sampled_from([1, 7, 48, 600, 1030]),
    dtype=dtypes,
    fused=st.booleans(),
    seed=seeds,
)
def test_silu_mul(lead, width, dtype, fused, seed):
    torch.manual_seed(seed)
    both = torch.randn(*lead, 2 * width, dtype=dtype) * 4
    gate, up = both.chunk(2, dim=-1)
    if not fused:
        gate, up = gate.contiguous(), up.contiguous()
    expected = F.silu(gate.float()).to(dtype) * up
    close(silu_mul(gate, up, backend="triton"), expected)
    torch.testing.assert_close(silu_mul(gate, up, backend="torch"), F.silu(gate) * up)
    for backend in ("triton", "torch"):
        into = gate.clone(memory_format=torch.contiguous_format)
        assert silu_mul_(into, up, backend=backend) is into
        close(into, expected)


def test_empty_batches():
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6, backend="triton").shape == (0, 8)
    assert silu_mul(torch.zeros(0, 8), torch.zeros(0, 8), backend="triton").shape == (0, 8)


def test_extremes_stay_finite():
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]])
    got = silu_mul(gate, torch.ones_like(gate), backend="triton")
    torch.testing.assert_close(got, F.silu(gate), atol=1e-30, rtol=1e-6)
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, backend="triton").any()


def arena_arguments(**changes):
    arguments = {
        "q": torch.zeros(3, 4, 16),
        "k": torch.zeros(3, 2, 16),
        "v": torch.zeros(3, 2, 16),
        "cos": torch.zeros(3, 8),
        "sin": torch.zeros(3, 8),
        "keys": torch.zeros(2, 2, 6, 16),
        "values": torch.zeros(2, 2, 6, 16),
        "slots": torch.zeros(3, dtype=torch.int64),
        "positions": torch.arange(3),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 4, 15)}, "dh even"),
        ({"k": torch.zeros(2, 2, 16)}, r"k must be \[3, Hkv, 16\]"),
        ({"v": torch.zeros(3, 2, 8)}, r"v must be \[3, Hkv, 16\]"),
        ({"v": torch.zeros(3, 1, 16)}, "k and v"),
        ({"sin": torch.zeros(3, 16)}, "cos and sin alike"),
        ({"cos": torch.zeros(2, 8)}, "cos must be"),
        ({"keys": torch.zeros(2, 1, 6, 16)}, "keys must be"),
        ({"values": torch.zeros(2, 2, 7, 16)}, "keys and values"),
        ({"keys": torch.zeros(2, 2, 6, 32)[..., ::2]}, "adjacent in keys"),
        ({"slots": torch.zeros(3)}, "slots must be int64"),
        ({"positions": torch.arange(4)}, "positions must be int64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(backend, changes, message):
    with pytest.raises(ValueError, match=message):
        rope_append(**arena_arguments(**changes), backend=backend)


def test_other_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="one shape"):
        silu_mul(torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="contiguous"):
        silu_mul_(torch.zeros(2, 16)[:, :8], torch.zeros(2, 8))


def test_what_the_kernels_cannot_do_is_said():
    with pytest.raises(BackendError, match="different types"):
        rms_norm(torch.zeros(2, 8), torch.ones(8, dtype=torch.float16), 1e-6, backend="triton")
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(BackendError, match="no backward"):
        rms_norm(torch.zeros(2, 8), weight, 1e-6, backend="triton")
    one_token = arena_arguments(
        q=torch.zeros(1, 256, 16),
        k=torch.zeros(1, 2, 16),
        v=torch.zeros(1, 2, 16),
        cos=torch.zeros(1, 8),
        sin=torch.zeros(1, 8),
        slots=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
    )
    with pytest.raises(BackendError, match="128 heads"):
        rope_append(**one_token, backend="triton")
    rms_norm(torch.randn(2, 8), weight, 1e-6).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", ["rms_norm", "rope_append", "silu_mul"])
def test_the_cpu_takes_pytorch_unless_told_otherwise(name):
    tensors = [torch.zeros(1, 1, 16)] * 5
    assert dispatch.select(name, *tensors) is dispatch.Backend.TORCH


def test_custom_operators():
    """Schema, fake implementation and mutation, as ``torch.library`` checks them."""
    arguments = tuple(arena_arguments().values())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._rope_append_op, arguments, test_utils=checks)
    norm = (torch.randn(2, 3, 8), torch.ones(8), 1e-6)
    torch.library.opcheck(op._rms_norm_op, norm, test_utils=checks)
    gate, up = torch.randn(2, 2, 8)
    torch.library.opcheck(op._silu_mul_op, (gate, up), test_utils=checks)
    torch.library.opcheck(op._silu_mul_inplace_op, (gate, up), test_utils=checks)


def test_compiled_code_is_one_graph():
    def block(x, w, g):
        return silu_mul(rms_norm(x, w, 1e-6), g)

    x, w, g = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, g), block(x, w, g))


def test_operands_that_would_corrupt_are_refused():
    arena = torch.zeros(2, 3, 2, 4, 8)
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    table, good, bad = torch.zeros(2, 8), torch.tensor([0, 1]), torch.tensor([0, -1])
    for slots, positions in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="must not be negative"):
            rope_append(q, k, k, table, table, arena[0], arena[1], slots, positions)
    with pytest.raises(ValueError, match="one tensor"):
        silu_mul_(table, table)
    with pytest.raises(ValueError, match="eps must be a number"):
        rms_norm(table, torch.ones(8), "1e-6")
