"""The decode step on a GPU: bf16 and fp16 against float32 arithmetic on the same values."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.layers import SIZES, LayerSize, converted, random_layer, step_of
from ume_kernels import decode_layer
from ume_kernels.decode import attend_cache

pytestmark = pytest.mark.gpu(dry=True)

HEADS = {dim: LayerSize(320, 448, 8, 2, dim) for dim in (64, 80, 96, 128)}


def arena(size, batch, capacity, lengths, device, dtype, unused):
    """Keys and values with ``unused`` where no token is cached."""
    cache = torch.randn(2, batch, size.kv_heads, capacity, size.head_dim, device=device).to(dtype)
    for row, length in enumerate(lengths.tolist()):
        cache[:, row, :, length:] = unused
    return cache.unbind(0)


def ragged(batch, queries, capacity):
    """Lengths with an empty row, a full one, tile edges, and others."""
    edges = [capacity - queries, 0, 1, 63, 64, 65, 127, 128]
    edges = [n for n in edges if n <= capacity - queries][:batch]
    others = torch.randint(0, capacity - queries + 1, (batch - len(edges),)).tolist()
    return torch.tensor(edges + others)


def bits(x):
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@torch.no_grad()
def check_layer(parity, size, batch, queries, capacity, device, dtype):
    weights = random_layer(size, device, dtype)
    lengths = ragged(batch, queries, capacity).to(device)
    x = torch.randn(batch, queries, size.width, device=device).to(dtype)
    nan = float("nan")
    keys, values = arena(size, batch, capacity, lengths, device, dtype, unused=nan)
    before = torch.stack([keys, values])
    finite = [t.nan_to_num(0.0) for t in (keys, values)]

    step = step_of(size, lengths, queries, capacity, dtype)
    got = decode_layer(x, step, keys, values, weights, size.shape, backend="triton")
    plain = [t.clone() for t in finite]
    eager = decode_layer(x, step, *plain, weights, size.shape, backend="torch")
    exact = [t.float() for t in finite]
    wide = step_of(size, lengths, queries, capacity, torch.float32)
    truth = decode_layer(
        x.float(), wide, *exact, converted(weights, torch.float32), size.shape, backend="torch"
    )
    parity.check(got, eager, truth)

    new = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
    for row, length in enumerate(lengths.tolist()):
        new[row, length : length + queries] = True
    for name, mine, theirs, true in zip(
        ("keys", "values"), (keys, values), plain, exact, strict=True
    ):
        pick = [t.transpose(1, 2)[new] for t in (mine, theirs, true)]
        parity.check(*pick, what=f"appended {name}")
    after = torch.stack([keys, values]).transpose(2, 3)
    same = bits(after) == bits(before.transpose(2, 3))
    assert bool(same[:, ~new].all()), "something else in the arena was written"


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("dim", HEADS)
def test_every_head_size_and_chunk(parity, device, dtype, dim, queries, dry_run):
    if dry_run and (queries not in (1, 6) or dim not in (64, 80)):
        pytest.skip("a dry run takes a few of them")
    check_layer(parity, HEADS[dim], 5 if dry_run else 9, queries, 80, device, dtype)


@pytest.mark.parametrize(
    ("batch", "queries", "capacity"),
    [(1, 1, 320), (1, 6, 320), (2, 8, 130), (3, 5, 1024), (5, 1, 64), (17, 6, 256), (33, 1, 200),
     (64, 1, 1088), (64, 6, 1088), (65, 2, 96)],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["qwen2-vl-2b", "qwen2.5-vl-3b", "qwen2-vl-7b"])
def test_published_shapes(parity, device, dtype, dry_run, shape, batch, queries, capacity):
    if dry_run:
        if shape != "qwen2-vl-2b" or batch > 3:
            pytest.skip("a dry run takes a few of them")
        shape, capacity = "tiny", min(capacity, 70)
    check_layer(parity, SIZES[shape], batch, queries, capacity, device, dtype)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("dim", HEADS)
def test_attend_cache(parity, device, dtype, dim, queries, dry_run):
    size, slots_held, capacity = HEADS[dim], 7, 40 if dry_run else 600
    slots = torch.tensor([5, 0, 6, 2], device=device)
    lengths = torch.tensor([1, capacity - queries + 1, 17, 33], device=device)
    held = torch.zeros(slots_held, dtype=torch.long, device=device)
    held[slots] = lengths + queries - 1
    keys, values = arena(size, slots_held, capacity, held, device, dtype, unused=float("nan"))
    q = torch.randn(4, queries, size.heads, dim, device=device).to(dtype)
    got = attend_cache(q, keys, values, slots, lengths, backend="triton")
    clean = [t.nan_to_num(0.0) for t in (keys, values)]
    eager = attend_cache(q, *clean, slots, lengths, backend="torch")
    truth = torch.empty_like(q, dtype=torch.float32)
    group = size.heads // size.kv_heads
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        for i in range(queries):
            for head in range(size.heads):
                k, v = (t[slot, head // group, : length + i].float() for t in (keys, values))
                weight = torch.softmax(k @ q[row, i, head].float() / dim**0.5, dim=0)
                truth[row, i, head] = weight @ v
    parity.check(got, eager, truth)


@torch.no_grad()
def test_equal_runs_give_equal_bits(device, dry_run):
    size = SIZES["tiny" if dry_run else "qwen2-vl-2b"]
    dtype = torch.float32 if dry_run else torch.bfloat16
    for batch, queries in ((1, 1), (1, 6), (5, 6)):
        weights = random_layer(size, device, dtype)
        lengths = torch.arange(batch, device=device) * 7 + 9
        capacity = 64
        cache = arena(size, batch, capacity, lengths, device, dtype, unused=0.0)
        x = torch.randn(batch, queries, size.width, device=device).to(dtype)
        results = []
        for _ in range(2 if dry_run else 20):
            step = step_of(size, lengths, queries, capacity, dtype)
            keys, values = (t.clone() for t in cache)
            y = decode_layer(x, step, keys, values, weights, size.shape, backend="triton")
            results.append(torch.cat([y.flatten(), keys.flatten(), values.flatten()]))
        for other in results[1:]:
            assert torch.equal(other, results[0])


@torch.no_grad()
@pytest.mark.gpu
def test_two_streams_do_not_share_scratch_memory():
    """Split sums meet in counters and partial results: two streams must not mix them up."""
    size, device = SIZES["qwen2-vl-2b"], torch.device("cuda", 0)
    weights = random_layer(size, device, torch.bfloat16)
    rounds = 40

    def inputs(seed):
        torch.manual_seed(seed)
        lengths = torch.tensor([300, 5, 77], device=device)
        cache = arena(size, 3, 320, lengths, device, torch.bfloat16, unused=0.0)
        x = torch.randn(3, 6, size.width, device=device).bfloat16()
        return x, step_of(size, lengths, 6, 320, torch.bfloat16), cache

    def run(x, step, cache):
        return decode_layer(x, step, *cache, weights, size.shape, backend="triton")

    cases = [inputs(seed) for seed in (1, 2)]
    expected = [run(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[], []]
    for _ in range(rounds):
        for case, stream, out in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(run(*case))
    torch.cuda.synchronize()
    for out, want in zip(results, expected, strict=True):
        for got in out:
            assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.gpu
def test_a_captured_layer_follows_changed_lengths_and_inputs():
    size, device, dtype = SIZES["qwen2-vl-2b"], torch.device("cuda", 0), torch.bfloat16
    weights = random_layer(size, device, dtype)
    batch, queries, capacity = 4, 2, 400
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    x = torch.zeros(batch, queries, size.width, device=device, dtype=dtype)
    cache = torch.zeros(2, batch, size.kv_heads, capacity, size.head_dim, device=device).to(dtype)

    def run():
        step = step_of(size, lengths, queries, capacity, dtype)
        return decode_layer(x, step, cache[0], cache[1], weights, size.shape, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(6):
        torch.manual_seed(seed)
        lengths.copy_(torch.randint(0, capacity - queries + 1, (batch,)))
        x.copy_(torch.randn(x.shape))
        cache.copy_(torch.randn(cache.shape))
        for row, length in enumerate(lengths.tolist()):
            cache[:, row, :, length:] = float("nan")
        start = cache.clone()
        graph.replay()
        replayed, written = out.clone(), cache.clone()
        cache.copy_(start)
        eager = run()
        assert torch.equal(replayed, eager)
        assert torch.equal(bits(written), bits(cache))


@torch.no_grad()
@pytest.mark.gpu
def test_memory_does_not_grow():
    size, device, dtype = SIZES["qwen2-vl-2b"], torch.device("cuda", 0), torch.bfloat16
    weights = random_layer(size, device, dtype)
    lengths = torch.tensor([50, 3], device=device)
    cache = arena(size, 2, 128, lengths, device, dtype, unused=0.0)
    x = torch.randn(2, 6, size.width, device=device).to(dtype)
    step = step_of(size, lengths, 6, 128, dtype)

    def memory(calls):
        for _ in range(calls):
            decode_layer(x, step, *cache, weights, size.shape, backend="triton")
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    assert memory(20) == memory(1000)


@torch.no_grad()
@pytest.mark.gpu
def test_torch_compile_passes_over_the_operators():
    size, device, dtype = SIZES["small"], torch.device("cuda", 0), torch.bfloat16
    weights = random_layer(size, device, dtype)
    lengths = torch.tensor([50, 3], device=device)
    cache = arena(size, 2, 128, lengths, device, dtype, unused=0.0)
    x = torch.randn(2, 6, size.width, device=device).to(dtype)
    step = step_of(size, lengths, 6, 128, dtype)

    def two_layers(x, keys, values):
        y = decode_layer(x, step, keys, values, weights, size.shape)
        return decode_layer(y * 0.5, step, keys, values, weights, size.shape) + 1

    expected_cache = [t.clone() for t in cache]
    expected = two_layers(x, *expected_cache)
    compiled = torch.compile(two_layers, fullgraph=True)
    got_cache = [t.clone() for t in cache]
    got = compiled(x, *got_cache)
    # Inductor may fuse the product and the sum around the operator and round once less.
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(got_cache, expected_cache, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
