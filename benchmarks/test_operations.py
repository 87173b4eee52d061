"""Single operations at Qwen2-VL-2B's width: adapter, a decode step, prefill parts, linear layers.

    pytest benchmarks/test_operations.py --benchmark-only --benchmark-json=out.json

Weights rotate among a few sets so that they come from memory, as they do in a model. The top-k and
the contrastive loss are in ``test_similarity.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.cost import Adapter, Decoder, Work
from benchmarks.gpu.layers import SIZES, random_layer, rope_of, step_of
from benchmarks.limits import floor
from benchmarks.record import record
from benchmarks.rivals.official_adapter import OfficialStyleAdapter
from benchmarks.rivals.packed_adapter import PackedAdapter
from benchmarks.roofline import load
from benchmarks.scale import scale
from ume_kernels import MoETransition, decode_layer
from ume_kernels.decode.reference import decode_layer_reference
from ume_kernels.linear import linear
from ume_kernels.prefill import rms_norm, rope_append, silu_mul

SIZE = scale()
DEVICE = SIZE.device
LAYER = SIZES[SIZE.layer]
DTYPE = torch.float32 if SIZE.tiny else torch.bfloat16
SETS = 2 if SIZE.tiny else 4
ROWS = (1, 3) if SIZE.tiny else (1, 16, 64)
TOKENS = 20 if SIZE.tiny else 1024
CACHED = 12 if SIZE.tiny else 300
EPS = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@cache
def adapters() -> list[MoETransition]:
    torch.manual_seed(0)
    made = (MoETransition(LAYER.width).to(DEVICE, DTYPE) for _ in range(SETS))
    return [m.eval().requires_grad_(False).pack_experts() for m in made]


@pytest.mark.parametrize("engine", ["moe_transition", "official module", "batched experts"])
@pytest.mark.parametrize("rows", ROWS)
def test_moe_transition(benchmark: Any, rows: int, engine: str) -> None:
    z, context = draw(rows, LAYER.width), draw(rows, LAYER.width)
    step = torch.tensor([3], device=DEVICE)
    made: dict[str, Callable[[MoETransition], Callable[[], Any]]] = {
        "moe_transition": lambda m: lambda: m(z, 3, context)[0],
        "official module": lambda m: partial(OfficialStyleAdapter(m), z, 3, context),
        "batched experts": lambda m: partial(PackedAdapter(m), z, context, step),
    }
    record(
        benchmark, [made[engine](m) for m in adapters()],
        section="operation", group=f"moe_transition, {counted(rows)}, D = {LAYER.width}",
        engine=engine, samples=rows, graph=engine != "official module",
        role=roles("moe_transition", "official module")(engine),
        floor_seconds=floor([Adapter().work(LAYER.width, rows)]),
    )  # fmt: skip


def counted(rows: int) -> str:
    return f"{rows} row" + "s" * (rows != 1)


def roles(ours: str, reference: str) -> Callable[[str], Any]:
    return lambda name: {ours: "ours", reference: "reference"}.get(name, "rival")


@cache
def layers() -> list[Any]:
    return [random_layer(LAYER, DEVICE, DTYPE, seed) for seed in range(SETS)]


@pytest.mark.parametrize("engine", ["decode_layer", "PyTorch, one row at a time", "PyTorch"])
@pytest.mark.parametrize("rows", ROWS)
def test_decode_step(benchmark: Any, rows: int, engine: str) -> None:
    shape = LAYER.shape
    capacity = CACHED + 1
    hidden = draw(rows, 1, LAYER.width)
    size = (rows, LAYER.kv_heads, capacity, LAYER.head_dim)
    caches = [(draw(*size), draw(*size)) for _ in range(SETS)]
    lengths = torch.full((rows,), CACHED, device=DEVICE)
    step = step_of(LAYER, lengths, 1, capacity, DTYPE)
    single = step_of(LAYER, lengths[:1], 1, capacity, DTYPE)

    def row_by_row(w: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        for row in range(rows):
            one = slice(row, row + 1)
            plain(hidden[one], single, keys[one], values[one], w)

    def plain(x: Any, at: Any, keys: torch.Tensor, values: torch.Tensor, w: Any) -> torch.Tensor:
        return decode_layer_reference(x, at, keys, values, w, shape)

    made: dict[str, Callable[..., Callable[[], Any]]] = {
        "decode_layer": lambda w, k, v: partial(decode_layer, hidden, step, k, v, w, shape),
        "PyTorch, one row at a time": lambda w, k, v: partial(row_by_row, w, k, v),
        "PyTorch": lambda w, k, v: partial(plain, hidden, step, k, v, w),
    }
    calls = [made[engine](w, *kv) for w, kv in zip(layers(), caches, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        if engine != "decode_layer":
            patch.setenv("UME_BACKEND", "torch")
        record(
            benchmark, calls, section="operation", samples=rows, engine=engine,
            group=f"decode step of a layer, {counted(rows)} of {CACHED} tokens",
            role=roles("decode_layer", "PyTorch, one row at a time")(engine), graph=True,
            floor_seconds=floor([Decoder(load("2b")).layer(rows, 1, CACHED)]),
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["ume_kernels", "transformers' formula", "F.rms_norm"])
def test_rms_norm(benchmark: Any, engine: str) -> None:
    x, weight = draw(TOKENS, LAYER.width), draw(LAYER.width)

    def formula() -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * normed.to(x.dtype)

    made: dict[str, Callable[[], Any]] = {
        "ume_kernels": lambda: rms_norm(x, weight, EPS),
        "transformers' formula": formula,
        "F.rms_norm": lambda: F.rms_norm(x, weight.shape, weight, EPS),
    }
    part(benchmark, "rms_norm", made, engine, 2 * x.nbytes)


@pytest.mark.parametrize("engine", ["ume_kernels", "F.silu(gate) * up", "in place"])
def test_silu_mul(benchmark: Any, engine: str) -> None:
    gate, up = draw(TOKENS, LAYER.inner), draw(TOKENS, LAYER.inner)
    scratch = torch.empty_like(gate)

    def in_place() -> torch.Tensor:
        torch.sigmoid(gate, out=scratch)
        return scratch.mul_(gate).mul_(up)

    made: dict[str, Callable[[], Any]] = {
        "ume_kernels": lambda: silu_mul(gate, up),
        "F.silu(gate) * up": lambda: F.silu(gate) * up,
        "in place": in_place,
    }
    part(benchmark, "silu_mul", made, engine, 3 * gate.nbytes)


@pytest.mark.parametrize("engine", ["ume_kernels", "transformers' formula", "complex numbers"])
def test_rope_append(benchmark: Any, engine: str) -> None:
    heads, kv, dim = LAYER.heads, LAYER.kv_heads, LAYER.head_dim
    q, k, v = draw(TOKENS, heads, dim), draw(TOKENS, kv, dim), draw(TOKENS, kv, dim)
    half = [table.to(DTYPE) for table in rope_of(LAYER, TOKENS, DEVICE)]
    cos, sin = (torch.cat([table, table], dim=-1)[:, None] for table in half)
    keys, values = (torch.zeros(1, kv, TOKENS, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    at = torch.arange(TOKENS, device=DEVICE)
    slots = torch.zeros_like(at)
    turns = torch.complex(half[0].float(), half[1].float())[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def formula() -> torch.Tensor:
        keys[slots, :, at], values[slots, :, at] = turned(k), v
        return turned(q)

    def as_complex(x: torch.Tensor) -> torch.Tensor:
        # pairs lie half a head apart
        pairs = torch.complex(*x.float().chunk(2, dim=-1)) * turns
        return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)

    def complex_numbers() -> torch.Tensor:
        keys[slots, :, at], values[slots, :, at] = as_complex(k), v
        return as_complex(q)

    made: dict[str, Callable[[], Any]] = {
        "ume_kernels": lambda: rope_append(q, k, v, *half, keys, values, slots, at),
        "transformers' formula": formula,
        "complex numbers": complex_numbers,
    }
    moved = 2 * (q.nbytes + k.nbytes + v.nbytes)
    part(benchmark, "rope_append", made, engine, moved)


def part(
    benchmark: Any, name: str, made: dict[str, Callable[[], Any]], engine: str, moved: int
) -> None:
    ours, reference, _ = made
    record(
        benchmark, made[engine], section="operation", group=f"{name}, {TOKENS} tokens",
        engine=engine, samples=TOKENS, role=roles(ours, reference)(engine), graph=True,
        floor_seconds=floor([Work(moved, 0)]),
    )  # fmt: skip


@cache
def matrices() -> list[torch.Tensor]:
    return [draw(LAYER.inner, LAYER.width) * 0.02 for _ in range(SETS)]


@pytest.mark.parametrize("engine", ["ume_kernels.linear", "F.linear", "oneDNN, packed", "NumPy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", (1, 3) if SIZE.tiny else (1, 8, 32))
def test_linear(benchmark: Any, rows: int, dtype: str, engine: str) -> None:
    kind = getattr(torch, dtype)
    x, weights = draw(rows, LAYER.width, dtype=kind), [w.to(kind) for w in matrices()]
    calls: list[Callable[[], Any]]
    if engine == "ume_kernels.linear":
        calls = [partial(linear, x, w) for w in weights]
    elif engine == "F.linear":
        calls = [partial(F.linear, x, w) for w in weights]
    elif engine == "NumPy":
        if dtype != "float32" or DEVICE.type != "cpu":
            pytest.skip("NumPy has no bfloat16 and knows no GPU")
        arrays = [w.numpy().T for w in weights]
        calls = [partial(np.dot, x.numpy(), w) for w in arrays]
    else:
        calls = packed(x, weights)
    work = Work(weights[0].nbytes + x.nbytes, 2 * rows * weights[0].numel())
    record(
        benchmark, calls, section="operation", samples=rows, engine=engine, graph=True,
        group=f"linear, {counted(rows)}, {LAYER.width} → {LAYER.inner}, {dtype}",
        role=roles("ume_kernels.linear", "F.linear")(engine),
        floor_seconds=floor([work]) if dtype == "bfloat16" or rows == 1 else None,
    )  # fmt: skip


def packed(x: torch.Tensor, weights: list[torch.Tensor]) -> list[Callable[[], Any]]:
    """oneDNN on weights that were laid out anew for it beforehand."""
    if DEVICE.type != "cpu" or not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is for CPUs")
    operator = torch.ops.mkldnn._linear_pointwise
    reorder = torch.ops.mkldnn._reorder_linear_weight
    laid_out = [reorder(w, x.shape[0]) for w in weights]
    return [partial(operator, x, w, None, "none", [], "") for w in laid_out]
