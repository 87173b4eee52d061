"""The Triton decode kernels in the interpreter against the PyTorch definition."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ume_kernels import LayerShape, attend_cache, decode_layer, decode_step, rope_table, tuning
from ume_kernels.decode import DecoderLayerWeights, DecodeStep, attend_cache_reference
from ume_kernels.decode import decode_layer_reference as reference
from ume_kernels.decode.workspace import ArrivalCounters, arrival_counters, own_counters
from ume_kernels.dispatch import BackendError
from ume_kernels.triton_backend import interpreting

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not interpreting(), reason="tests/gpu has the compiled kernels"),
]


def make_layer(
    width: int, shape: LayerShape, inner: int, dtype: torch.dtype, bias: bool = True
) -> DecoderLayerWeights:
    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size) / size[-1] ** 0.5).to(dtype)

    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return DecoderLayerWeights(
        input_norm=1 + 0.3 * torch.randn(width).to(dtype),
        q_weight=draw(q, width),
        q_bias=draw(q) if bias else None,
        k_weight=draw(kv, width),
        k_bias=draw(kv) if bias else None,
        v_weight=draw(kv, width),
        v_bias=draw(kv) if bias else None,
        o_weight=draw(width, q),
        post_norm=1 + 0.3 * torch.randn(width).to(dtype),
        gate_weight=draw(inner, width),
        up_weight=draw(inner, width),
        down_weight=draw(width, inner),
    )


def to_float(w: DecoderLayerWeights) -> DecoderLayerWeights:
    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    return DecoderLayerWeights(**{k: None if v is None else v.float() for k, v in fields.items()})


def tables(shape: LayerShape, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    return rope_table(positions, 1e4**-exponent)


def run_both(
    lengths, queries, shape, width, inner, dtype=torch.float32, bias=True, capacity=None, moved=0
):
    """(Triton, reference in float32, reference in dtype): outputs and arenas."""
    weights = make_layer(width, shape, inner, dtype, bias)
    longest = max(lengths) + queries
    capacity = capacity or longest + 5
    hidden = torch.randn(len(lengths), queries, width).to(dtype)
    arena = torch.randn(2, len(lengths), shape.num_kv_heads, capacity, shape.head_dim).to(dtype)
    rope = tables(shape, capacity + 9)
    out = []
    for kind in ("triton", "float32", "eager"):
        kv = arena.float() if kind == "float32" else arena.clone()
        x = hidden.float() if kind == "float32" else hidden
        w = to_float(weights) if kind == "float32" else weights
        offsets = None
        if moved:  # by another number in every row, backwards in some
            offsets = torch.tensor([max(moved - 3 * row, -n) for row, n in enumerate(lengths)])
        step = decode_step(torch.tensor(lengths), queries, longest, rope, shape, x.dtype, offsets)
        if kind == "triton":
            for row, length in enumerate(lengths):
                kv[:, row, :, length:] = float("nan")  # must never be read
            y = decode_layer(x, step, kv[0], kv[1], w, shape, backend="triton")
            for row, length in enumerate(lengths):
                assert kv[:, row, :, length + queries :].isnan().all()
                kv[:, row, :, length + queries :] = arena[:, row, :, length + queries :]
        else:
            y = reference(x, step, kv[0], kv[1], w, shape)
        out.append((y, kv))
    return out


@settings(max_examples=settings.default.max_examples // 2)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    queries=st.integers(1, 8),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (7, 1), (3, 3)]),
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    width=st.sampled_from([32, 48, 80]),
    inner=st.sampled_from([16, 40, 96]),
    bias=st.booleans(),
    moved=st.sampled_from([0, 6]),
    seed=st.integers(0, 99),
)
def test_layer_equals_the_reference(
    lengths, queries, heads, head_dim, width, inner, bias, moved, seed
):
    torch.manual_seed(seed)
    shape = LayerShape(*heads, head_dim, 1e-6)
    (got, arena), (expected, expected_arena), _ = run_both(
        lengths, queries, shape, width, inner, bias=bias, moved=moved
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arena, expected_arena, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 9, 30, 50])
@pytest.mark.parametrize("queries", [1, 5])
def test_half_precision_stays_within_twice_the_eager_error(batch, queries):
    """Every tuned form: one row, one, two and four row blocks, and cuBLAS."""
    torch.manual_seed(batch)
    shape = LayerShape(4, 2, 16, 1e-6)
    lengths = torch.randint(0, 70, (batch,)).tolist()
    (got, arena), (truth, truth_arena), (eager, eager_arena) = run_both(
        lengths, queries, shape, 96, 160, torch.float16
    )
    for fast, exact, half in ((got, truth, eager), (arena, truth_arena, eager_arena)):
        error = (half.float() - exact).abs().max()
        assert 0 < error < 0.05
        assert (fast.float() - exact).abs().max() <= 2 * error


def test_float16_does_not_overflow_before_the_norm_scales():
    shape = LayerShape(2, 1, 16, 1e-6)
    weights = make_layer(32, shape, 48, torch.float16)
    weights = dataclasses.replace(weights, input_norm=torch.full((32,), 8.0, dtype=torch.float16))
    hidden = torch.full((1, 1, 32), 3e4, dtype=torch.float16)
    rope = tables(shape, 8)
    kv = torch.zeros(2, 1, 1, 8, 16, dtype=torch.float16)
    step = decode_step(torch.tensor([0]), 1, 1, rope, shape, torch.float16)
    decode_layer(hidden, step, kv[0], kv[1], weights, shape, backend="triton")
    expected = torch.zeros_like(kv)
    reference(hidden, step, expected[0], expected[1], weights, shape)
    assert expected.isfinite().all()
    torch.testing.assert_close(kv, expected, rtol=2e-2, atol=2e-2)


def shipped_tiles() -> list[tuple[str, int]]:
    """(kernel, rows) that reach every shipped entry with a Triton form."""
    out = []
    for file, kernel, entry in tuning.shipped("decode"):
        if file == "default" and not kernel.startswith("attend") and entry["gemm"] == "triton":
            out.append((kernel, entry["max_rows"]))
    return out


def test_every_shipped_row_class_is_exercised():
    """The batches of the half-precision test cover the row classes of the default table."""
    reached = {batch * queries for batch in (1, 3, 9, 30, 50) for queries in (1, 5)}
    limits = sorted({rows for _, rows in shipped_tiles()})
    assert limits
    for low, high in zip([0, *limits], limits, strict=False):
        assert any(low < rows <= high for rows in reached), (low, high)
    assert any(rows > limits[-1] for rows in reached)


@settings(max_examples=settings.default.max_examples // 2)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    queries=st.integers(1, 3),
    group=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_attend_cache_reads_the_named_slots(lengths, queries, group, seed):
    torch.manual_seed(seed)
    rows, kv_heads, dim, slots = len(lengths), 2, 16, 5
    q = torch.randn(rows, queries, kv_heads * group, dim)
    arena = torch.randn(2, slots, kv_heads, max(lengths) + queries + 2, dim)
    which = torch.randint(0, slots, (rows,))
    counts = torch.tensor(lengths)
    got = attend_cache(q, arena[0], arena[1], which, counts, backend="triton")
    expected = attend_cache(q, arena[0], arena[1], which, counts, backend="torch")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for r in range(rows):
        for i in range(queries):
            for h in range(kv_heads * group):
                seen = lengths[r] + i
                k, v = arena[:, which[r], h // group, :seen]
                p = torch.softmax(k @ q[r, i, h] / dim**0.5, dim=0)
                torch.testing.assert_close(got[r, i, h], p @ v, rtol=1e-4, atol=1e-5)


def test_a_length_beyond_the_arena_writes_nothing():
    """The bound is the caller's; a wrong device length must not reach another row's memory."""
    shape = LayerShape(2, 1, 16, 1e-6)
    weights = make_layer(32, shape, 48, torch.float32)
    kv = torch.zeros(2, 2, 1, 4, 16)
    step = step_unchecked([9, 1], 1, 4, tables(shape, 16), shape)
    decode_layer(torch.randn(2, 1, 32), step, kv[0], kv[1], weights, shape, backend="triton")
    assert (kv[:, 0] == 0).all()
    assert (kv[:, 1, :, 1] != 0).any()
    assert (kv[:, 1, :, [0, 2, 3]] == 0).all()


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with a gap behind each of the last axis' rows."""
    out = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 9, dtype=x.dtype)
    out[..., ::2] = x
    return out[..., ::2]


def test_strides_make_no_difference():
    torch.manual_seed(3)
    shape = LayerShape(4, 2, 16, 1e-6)
    weights = make_layer(48, shape, 40, torch.float32)
    arena = torch.randn(2, 3, 2, 24, 16)
    rope, lengths = tables(shape, 24), torch.tensor([3, 7, 11])

    def run(hidden, lengths=lengths, rope=rope):
        kv = arena.clone()
        step = decode_step(lengths, hidden.shape[1], 24, rope, shape, hidden.dtype)
        return decode_layer(hidden, step, kv[0], kv[1], weights, shape, backend="triton"), kv

    def same(got, expected):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    many = torch.randn(3, 4, 48)
    one = many[:1, :1].expand(3, 1, 48)
    for strided in (many[:, -1:], many[:, ::2], spread(many)[:, :2], one):
        same(run(strided), run(strided.clone(memory_format=torch.contiguous_format)))
    hidden = many[:, :1].contiguous()
    expected = run(hidden)
    same(run(hidden, spread(lengths)), expected)
    same(run(hidden, rope=(spread(rope[0]), spread(rope[1]))), expected)
    five = torch.tensor([5])
    same(run(hidden, five.expand(3)), run(hidden, five.repeat(3)))

    q, slots, seen = torch.randn(3, 1, 4, 16), torch.tensor([2, 0, 2]), torch.tensor([4, 9, 1])
    expected = attend_cache(q, arena[0], arena[1], slots, seen, backend="triton")
    for change in (
        (spread(q), slots, seen), (q, spread(slots), seen), (q, slots, spread(seen)),
    ):  # fmt: skip
        same(attend_cache(change[0], arena[0], arena[1], *change[1:], backend="triton"), expected)


def step_unchecked(lengths, queries, max_length, rope, shape):
    """A step as on a device, where lengths are not looked at."""
    return DecodeStep(torch.tensor(lengths), queries, max_length, *rope, shape, torch.float32)


def test_nothing_outside_of_the_arena_is_touched():
    shape = LayerShape(4, 2, 16, 1e-6)
    weights = make_layer(48, shape, 40, torch.float32)
    around = torch.full((2, 12, 2, 8, 16), 7.0)
    arena = around[:, 5:7]
    rope = tables(shape, 4)
    for lengths in ([-3, 4], [-40, 40], [7, 7]):
        arena.fill_(0.5)
        step = step_unchecked(lengths, 1, 4, rope, shape)
        hidden = torch.randn(2, 1, 48)
        decode_layer(hidden, step, arena[0], arena[1], weights, shape, backend="triton")
        assert (around[:, :5] == 7).all() and (around[:, 7:] == 7).all()
        assert (arena == 0.5).all(), "a position beyond arena or table is not written"


def test_a_slot_that_does_not_exist_reads_nothing():
    around = torch.full((9, 2, 8, 16), 1e9)
    arena = around[3:6]
    arena.fill_(1.0)
    got = attend_cache_kernel(torch.ones(3, 1, 4, 16), arena, torch.tensor([-1, 1, 3]))
    assert (got[[0, 2]] == 0).all() and (got[1] == 1).all()


def attend_cache_kernel(q, arena, slots):
    from ume_kernels.decode.triton_layer import attend_triton

    return attend_triton(q, arena, arena, slots, torch.full((len(slots),), 5), extra=0)


def test_wrong_operands_are_named():
    shape = LayerShape(4, 2, 16, 1e-6)
    weights = make_layer(48, shape, 40, torch.float32)
    kv, rope = torch.zeros(2, 1, 2, 8, 16), tables(shape, 8)
    hidden = torch.zeros(1, 1, 48)

    def call(w, shape=shape):
        step = decode_step(torch.tensor([0]), 1, 4, rope, shape, torch.float32)
        decode_layer(hidden, step, kv[0], kv[1], w, shape, backend="triton")

    for field in dataclasses.fields(weights):
        short = getattr(weights, field.name)[:-1]
        if field.name == "gate_weight":  # it sets the inner width
            short = getattr(weights, field.name)[:, :-1]
        with pytest.raises(ValueError, match=r"_weight is|_norm is|_bias is"):
            call(dataclasses.replace(weights, **{field.name: short}))
    with pytest.raises(ValueError, match="all have a bias"):
        call(dataclasses.replace(weights, q_bias=None))
    for lengths, message in (
        (torch.tensor([-1]), "not within"), (torch.tensor([4]), "not within"),
        (torch.tensor([1.0]), "integers"), (torch.tensor([[1]]), "integers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            decode_step(lengths, 1, 4, rope, shape, torch.float32)
    with pytest.raises(ValueError, match="do not fit max_length"):
        decode_step(torch.tensor([0]), 5, 4, rope, shape, torch.float32)
    half = (rope[0].half(), rope[1].half())
    with pytest.raises(ValueError, match="must be float32"):
        decode_step(torch.tensor([0]), 1, 4, half, shape, torch.float32)
    q, seen = torch.zeros(1, 1, 4, 16), torch.tensor([1])
    with pytest.raises(ValueError, match="slot 1 is not one of the arena's 1"):
        attend_cache(q, kv[0], kv[1], torch.tensor([1]), seen)
    with pytest.raises(ValueError, match="slots must be int64"):
        attend_cache(q, kv[0], kv[1], torch.tensor([0.0]), seen)
    nothing = attend_cache(q[:0], kv[0], kv[1], seen[:0], seen[:0])
    assert nothing.shape == (0, 1, 4, 16)


def test_what_the_kernels_cannot_do_is_named():
    shape = LayerShape(2, 1, 16, 1e-6)
    weights = make_layer(32, shape, 48, torch.float32)
    kv = torch.zeros(2, 1, 1, 16, 16)
    rope = tables(shape, 16)

    def call(hidden, w=weights, cache=kv, queries=1):
        step = decode_step(torch.tensor([0]), queries, 12, rope, shape, hidden.dtype)
        decode_layer(hidden, step, cache[0], cache[1], w, shape, backend="triton")

    half = {f.name: getattr(weights, f.name).bfloat16() for f in dataclasses.fields(weights)}
    with pytest.raises(BackendError, match="bfloat16"):
        call(
            torch.zeros(1, 1, 32, dtype=torch.bfloat16), DecoderLayerWeights(**half), kv.bfloat16()
        )
    with pytest.raises(BackendError, match="differ in dtype"):
        call(torch.zeros(1, 1, 32), cache=kv.half())
    with pytest.raises(BackendError, match="more than 8 new tokens"):
        call(torch.zeros(1, 9, 32), queries=9)
    with pytest.raises(BackendError, match="weights must be contiguous"):
        call(torch.zeros(1, 1, 32), dataclasses.replace(weights, o_weight=torch.zeros(32, 32).t()))
    with pytest.raises(BackendError, match="tokens one after another"):
        call(torch.zeros(1, 1, 32), cache=torch.zeros(2, 1, 1, 16, 32)[..., ::2])
    with pytest.raises(BackendError, match="no backward"):
        call(torch.zeros(1, 1, 32, requires_grad=True))
    with pytest.raises(ValueError, match="rotary cos table"):
        decode_step(torch.tensor([0]), 1, 17, rope, shape, torch.float32)
    with pytest.raises(ValueError, match="hidden states of width 40"):
        call(torch.zeros(1, 1, 40))
    step = decode_step(torch.tensor([0]), 1, 12, rope, shape, torch.float32)
    other = LayerShape(1, 1, 16, 1e-6)
    with pytest.raises(ValueError, match="step was made for"):
        decode_layer(torch.zeros(1, 1, 32), step, kv[0], kv[1], weights, other)
    with pytest.raises(ValueError, match=r"step was made for torch\.float32"):
        decode_layer(torch.zeros(1, 1, 32).half(), step, kv[0], kv[1], weights, shape)
    with pytest.raises(ValueError, match="lengths must be"):
        attend_cache(torch.zeros(1, 1, 2, 16), kv[0], kv[1], torch.zeros(1).long(), torch.ones(2))


def test_operators_are_well_formed():
    """Schema, fake implementation and mutation as torch.library expects them."""
    shape = LayerShape(2, 1, 16, 1e-6)
    w = make_layer(32, shape, 48, torch.float32)
    kv = torch.zeros(2, 1, 1, 16, 16)
    cos, sin = tables(shape, 16)
    flat = [getattr(w, f.name) for f in dataclasses.fields(w)]
    arguments = (torch.randn(1, 1, 32), torch.tensor([3]), cos, sin, kv[0], kv[1], *flat)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.ume.decode_layer.default,
        (*arguments, 2, 1, 16, 1e-6, 8, torch.tensor([2]), None),
        test_utils=checks,
    )
    q = torch.randn(1, 1, 2, 16)
    torch.library.opcheck(
        torch.ops.ume.attend_cache.default,
        (q, kv[0], kv[1], torch.tensor([0]), torch.tensor([4]), None),
        test_utils=checks,
    )
    got = torch.ops.ume.attend_cache(
        q, kv[0], kv[1], torch.tensor([0]), torch.tensor([4]), "triton"
    )
    expected = attend_cache_reference(q, kv[0], kv[1], torch.tensor([0]), torch.tensor([4]))
    torch.testing.assert_close(got, expected)


def test_tuning_table_is_plain_json():
    path = Path(tuning.__file__).parent / "decode" / "tuning" / "default.json"
    table = json.loads(path.read_text())
    assert set(table["kernels"]) == {"qkv", "o", "gate_up", "down", "attend", "attend_fp32"}
    assert table["measured"] is False


def test_counters_belong_to_a_stream_or_to_an_owner():
    cpu = torch.device("cpu")
    mine = ArrivalCounters()
    default = arrival_counters(cpu, 10)
    assert arrival_counters(cpu, 20) is default
    with own_counters(mine):
        owned = arrival_counters(cpu, 10)
        assert owned is not default
        larger = arrival_counters(cpu, owned.numel() + 1)
        assert larger is not owned and larger.count_nonzero() == 0
        # what a captured launch points at stays alive
        assert any(held is owned for held in mine._buffers)
        assert arrival_counters(cpu, 10) is larger
    assert arrival_counters(cpu, 10) is default


@pytest.mark.parametrize("backend", [None, "triton"])
def test_compile_passes_over_a_step(backend):
    torch.manual_seed(0)
    shape = LayerShape(4, 2, 16, 1e-6)
    weights = make_layer(48, shape, 40, torch.float32)
    rope, slots = tables(shape, 24), torch.tensor([0, 2])

    def step_and_look(hidden, kv, lengths):
        step = decode_step(lengths, 2, 24, rope, shape, hidden.dtype)
        out = decode_layer(hidden, step, kv[0], kv[1], weights, shape, backend=backend)
        q = out[:2, :1, :].view(2, 1, 3, 16)[:, :, :2]
        return out, attend_cache(q, kv[0], kv[1], slots, lengths[:2], backend=backend)

    compiled = torch.compile(step_and_look, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 7, 11], [1, 20, 5]):
        hidden, kv = torch.randn(3, 2, 48), torch.randn(2, 3, 2, 24, 16)
        theirs, mine = kv.clone(), kv.clone()
        expected = step_and_look(hidden, theirs, torch.tensor(lengths))
        got = compiled(hidden, mine, torch.tensor(lengths))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(mine, theirs)
