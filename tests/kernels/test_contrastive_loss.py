"""contrastive_loss: the recorded official cases, the definition as a loop, and its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import ume_kernels
from ume_kernels.contrastive_loss import (
    blocked,
    contrastive_loss,
    contrastive_loss_reference,
)
from ume_kernels.contrastive_loss.lse import NAME
from ume_kernels.dispatch import BackendError

Tensor = torch.Tensor

OPS = load_file(Path(__file__).parents[1] / "conformance" / "plume_tiny" / "ops.safetensors")


def available(backend: str) -> bool:
    x = torch.zeros(1, 1)
    try:
        ume_kernels.explain(NAME, x, x, backend=backend)
    except BackendError:
        return False
    return True


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="cannot run here"))
    for name in ("torch", "native", "triton")
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last ones ragged, for matrices as small as those of the tests."""
    monkeypatch.setattr(blocked, "TILE_CPU", (7, 5))


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    size = float(expected.double().abs().max()) if expected.numel() else 0.0
    difference = float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0
    return difference / size if size else difference


def with_gradients(loss: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def matrices(n: int, m: int, d: int, seed: int = 0, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, d, generator=generator, dtype=torch.float64)
    p = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return [q.to(dtype), p.to(dtype)]


@pytest.mark.parametrize("case", ["nce0", "nce1", "nce2", "nce3"])
def test_recorded_official_cases(case: str, backend: str) -> None:
    q, p, valid = (OPS[f"{case}.{name}"] for name in ("q", "p", "valid"))
    for loss, options in (
        (contrastive_loss, {"backend": backend}),
        (contrastive_loss_reference, {}),
    ):
        value, dq, dp = with_gradients(loss, q, p, valid=valid, **options)
        assert relative(value, OPS[f"{case}.loss"][0]) <= 1e-5
        assert relative(dq, OPS[f"{case}.dq"]) <= 1e-5
        assert relative(dp, OPS[f"{case}.dp"]) <= 1e-5


# The definition once more, pair by pair.


def loop(
    q: Tensor,
    p: Tensor,
    scale: float = 50.0,
    bidirectional: bool = True,
    row_valid: list[bool] | None = None,
    col_valid: list[bool] | None = None,
    offset: int = 0,
    row_group: list[int] | None = None,
    col_group: list[int] | None = None,
    extra: Tensor | None = None,
    ignored: frozenset[tuple[int, int]] = frozenset(),
    margin: float = math.inf,
    normalize: bool = True,
) -> list[float]:
    """Loss of every row in Python floats; NaN where a row does not count."""

    def unit(x: Tensor) -> list[float]:
        values = [float(v) for v in x]
        norm = math.sqrt(sum(v * v for v in values)) if normalize else 1.0
        return [v / norm for v in values]

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    n, m = len(q), len(p)
    row_valid, col_valid = row_valid or [True] * n, col_valid or [True] * m
    row_group, col_group = row_group or [0] * n, col_group or [0] * m
    a, b = [unit(row) for row in q], [unit(row) for row in p]
    losses = []
    for i in range(n):
        c = i + offset
        if not (row_valid[i] and col_valid[c]):
            losses.append(math.nan)
            continue
        positive = dot(a[i], b[c])
        row_terms, col_terms = [math.exp(scale * positive)], [math.exp(scale * positive)]
        for j in range(m):
            if j == c or row_group[i] != col_group[j] or (i, j) in ignored:
                continue
            s = dot(a[i], b[j])
            if not col_valid[j]:
                row_terms.append(math.exp(-1e4))
            elif s <= positive - margin or margin == math.inf:
                row_terms.append(math.exp(scale * s))
        for h in [] if extra is None else range(extra.shape[-2]):
            s = dot(a[i], unit(extra[h] if extra.ndim == 2 else extra[i, h]))
            if s <= positive - margin or margin == math.inf:
                row_terms.append(math.exp(scale * s))
        for k in range(n):
            if k == i or row_group[k] != col_group[c] or (k, c) in ignored:
                continue
            s = dot(a[k], b[c])
            if not row_valid[k]:
                col_terms.append(math.exp(-1e4))
            elif s <= positive - margin or margin == math.inf:
                col_terms.append(math.exp(scale * s))
        loss = math.log(sum(row_terms)) - scale * positive
        if bidirectional:
            loss = (loss + math.log(sum(col_terms)) - scale * positive) / 2
        losses.append(loss)
    return losses


N, M, D, OFFSET = 6, 9, 5, 2
ROW_VALID = [True, False, True, True, True, True]
COL_VALID = [True, True, True, True, False, True, True, True, False]
ROW_GROUP = [7, 7, -3, -3, 7, 7]
COL_GROUP = [-3, 7, 7, 7, -3, -3, 7, 7, 11]
IGNORED = frozenset({(0, 0), (0, 8), (3, 1), (5, 2), (4, 4)})
LISTED = torch.tensor([*sorted(IGNORED, reverse=True), (0, 8)])  # unsorted, one twice
SHARED = torch.randn(4, D, generator=torch.Generator().manual_seed(5), dtype=torch.double)
OWN = torch.randn(N, 3, D, generator=torch.Generator().manual_seed(6), dtype=torch.double)

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one direction": ({"bidirectional": False}, {"bidirectional": False}),
    "scale": ({"scale": 2.5}, {"scale": 2.5}),
    "not normalised": ({"normalize": False, "scale": 0.7}, {"normalize": False, "scale": 0.7}),
    "columns valid": (
        {"valid": torch.tensor(COL_VALID)},
        {"row_valid": COL_VALID[OFFSET : OFFSET + N], "col_valid": COL_VALID},
    ),
    "rows and columns valid": (
        {"valid": (torch.tensor(ROW_VALID), torch.tensor(COL_VALID))},
        {"row_valid": ROW_VALID, "col_valid": COL_VALID},
    ),
    "groups": (
        {"groups": (torch.tensor(ROW_GROUP), torch.tensor(COL_GROUP))},
        {"row_group": ROW_GROUP, "col_group": COL_GROUP},
    ),
    "column groups": (
        {"groups": torch.tensor(COL_GROUP, dtype=torch.int8)},
        {"row_group": COL_GROUP[OFFSET : OFFSET + N], "col_group": COL_GROUP},
    ),
    "shared extra": ({"extra_negatives": SHARED}, {"extra": SHARED}),
    "own extra": ({"extra_negatives": OWN}, {"extra": OWN}),
    "ignored pairs": ({"ignore": LISTED}, {"ignored": IGNORED}),
    "margin": (
        {"scale": 5.0, "ignore": 0.1, "extra_negatives": SHARED},
        {"scale": 5.0, "margin": 0.1, "extra": SHARED},
    ),
    "negative margin": ({"ignore": -0.2}, {"margin": -0.2}),
    "everything": (
        {
            "scale": 4.0,
            "valid": (torch.tensor(ROW_VALID), torch.tensor(COL_VALID)),
            "groups": (torch.tensor(ROW_GROUP), torch.tensor(COL_GROUP)),
            "ignore": (LISTED, 0.05),
            "extra_negatives": OWN,
        },
        {
            "scale": 4.0,
            "row_valid": ROW_VALID,
            "col_valid": COL_VALID,
            "row_group": ROW_GROUP,
            "col_group": COL_GROUP,
            "ignored": IGNORED,
            "margin": 0.05,
            "extra": OWN,
        },
    ),
}


def cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    if "extra_negatives" not in options:
        return options
    return {**options, "extra_negatives": options["extra_negatives"].to(dtype)}


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_the_loop(name: str) -> None:
    q, p = matrices(N, M, D, dtype=torch.double)
    options, plain = OPTIONS[name]
    expected = torch.tensor(loop(q, p, offset=OFFSET, **plain), dtype=torch.double)
    rows = contrastive_loss_reference(q, p, row_offset=OFFSET, reduction="none", **options)
    counted = int((~expected.isnan()).sum())
    expected = expected.nan_to_num(0.0)
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-11)
    total = contrastive_loss_reference(q, p, row_offset=OFFSET, reduction="sum", **options)
    mean = contrastive_loss_reference(q, p, row_offset=OFFSET, **options)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mean, expected.sum() / counted, rtol=1e-11, atol=1e-11)


CASES = [*((name, "mean") for name in OPTIONS), ("everything", "sum"), ("everything", "none")]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_every_option_and_its_gradients(name: str, reduction: str, backend: str) -> None:
    options = {**OPTIONS[name][0], "row_offset": OFFSET, "reduction": reduction}
    q, p = matrices(N, M, D)
    scale = torch.tensor(float(options.pop("scale", 50.0)))
    extra = options.pop("extra_negatives", None)
    inputs = [q, p, scale] if extra is None else [q, p, scale, extra.float()]

    def run(loss: Any, **more: Any) -> Any:
        def call(q: Tensor, p: Tensor, scale: Tensor, extra: Tensor | None = None) -> Tensor:
            return loss(q, p, scale=scale, extra_negatives=extra, **options, **more)

        return call

    expected = with_gradients(run(contrastive_loss_reference), *(t.double() for t in inputs))
    found = with_gradients(run(contrastive_loss, backend=backend), *inputs)
    for got, wanted in zip(found, expected, strict=True):
        # The gradient of the scale is a small difference of scores near 1.
        assert relative(got, wanted) <= 2e-5 or float((got - wanted).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (1, 6, 3), (13, 13, 33), (23, 40, 7), (40, 41, 17)]
)
def test_odd_shapes(n: int, m: int, d: int, backend: str) -> None:
    q, p = matrices(n, m, d, seed=n)
    options = {"row_offset": (m - n) // 2, "scale": 10.0}
    expected = with_gradients(contrastive_loss_reference, q.double(), p.double(), **options)
    found = with_gradients(contrastive_loss, q, p, backend=backend, **options)
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        assert float((got.double() - wanted).abs().max()) <= 2e-5 * max(
            1.0, float(wanted.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_accumulate_in_float32(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype is torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    q, p = matrices(30, 37, 64, dtype=dtype)
    options = {"row_offset": 3, "valid": torch.arange(37) % 5 != 0}
    expected = with_gradients(contrastive_loss_reference, q.double(), p.double(), **options)
    found = with_gradients(contrastive_loss, q, p, backend=backend, **options)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    # On the GPU backends float16 rows are normalised in float16, which their gradients need.
    rounded = backend == "triton" and dtype is torch.float16
    assert relative(found[0], expected[0]) <= (2e-4 if rounded else 1e-6)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert relative(got, wanted) <= torch.finfo(dtype).eps


@given(
    n=st.integers(1, 12),
    more=st.integers(0, 9),
    d=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
    grouped=st.booleans(),
    entries=st.integers(0, 20),
    margin=st.sampled_from([None, 0.05, -0.3]),
    normalize=st.booleans(),
    bidirectional=st.booleans(),
    native=st.booleans(),
)
def test_random_conditions(
    n: int,
    more: int,
    d: int,
    seed: int,
    masked: bool,
    grouped: bool,
    entries: int,
    margin: float | None,
    normalize: bool,
    bidirectional: bool,
    native: bool,
) -> None:
    m = n + more
    q, p = matrices(n, m, d, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(more + 1, (1,), generator=generator))
    options: dict[str, Any] = {
        "row_offset": offset,
        "normalize": normalize,
        "bidirectional": bidirectional,
        "scale": 3.0,
    }
    if masked:
        options["valid"] = tuple(torch.rand(k, generator=generator) < 0.7 for k in (n, m))
    if grouped:
        options["groups"] = torch.randint(3, (m,), generator=generator)
    pairs = None
    if entries:
        rows = torch.randint(n, (entries,), generator=generator)
        columns = torch.randint(m, (entries,), generator=generator)
        pairs = torch.stack([rows, columns], 1)[columns != rows + offset]
    options["ignore"] = (pairs, margin)
    backend = "native" if native and available("native") else "torch"
    expected, stats = contrastive_loss_reference(
        q.double(), p.double(), return_stats=True, **options
    )
    found, got = contrastive_loss(q, p, return_stats=True, backend=backend, **options)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    assert torch.equal(got.count, stats.count)
    torch.testing.assert_close(got.lse.double(), stats.lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.hardest.double(), stats.hardest, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_reference_and_blocked() -> None:
    q, p = matrices(4, 6, 3, dtype=torch.double)
    scale = torch.tensor(3.0, dtype=torch.double)
    extra = torch.randn(2, 3, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    options = {
        "row_offset": 1,
        "valid": (torch.tensor([True, True, False, True]), torch.arange(6) != 0),
        "groups": torch.tensor([0, 0, 0, 1, 1, 1]),
        "ignore": torch.tensor([[0, 2]]),
        "reduction": "none",
    }
    inputs = [t.requires_grad_() for t in (q, p, scale, extra)]
    for loss in (contrastive_loss, contrastive_loss_reference):
        for normalize in (True, False):
            call = partial(loss, normalize=normalize, **options)
            assert torch.autograd.gradcheck(
                lambda q, p, scale, extra, call=call: call(
                    q, p, scale=scale, extra_negatives=extra
                ),
                inputs,
            )
    assert torch.autograd.gradgradcheck(
        lambda q, p: contrastive_loss_reference(q, p, scale=2.0), inputs[:2]
    )
