"""The CPU tile engine on every instruction set, against exact integers and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ume_kernels import native

if native.module is None:
    pytest.skip(str(native.missing), allow_module_level=True)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISAS = list(native.require().cpu_isas())
if "avx512f" in ISAS:  # what the loops around the matrix tiles need
    ISAS.append("amx_emulated")

# Around panels of 8, 16 and 32 columns, blocks of 4, 6, 12 and 32 rows, words of two elements,
# tiles of 16 words and slices of 512.
SHAPES = (
    (1, 1, 1),
    (2, 3, 5),
    (4, 8, 2),
    (5, 9, 15),
    (7, 31, 32),
    (12, 32, 33),
    (13, 33, 64),
    (32, 64, 97),
    (37, 70, 1030),
    (25, 300, 48),
    (3, 20, 2049),
)


def matrix(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def width(a: torch.dtype, b: torch.dtype, columns: int, isa: str) -> int:
    lanes = native.require().tile_lanes(DTYPES[a], DTYPES[b], isa)
    return -(-columns // lanes) * lanes


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    isa: str,
    *,
    transposed: bool = True,
    onto: torch.Tensor | None = None,
    narrow: bool = False,
) -> torch.Tensor:
    """``a bᵀ``, or ``a b``, added to `onto`; checks that nothing else is written."""
    n = b.shape[0] if transposed else b.shape[1]
    wide = width(a.dtype, b.dtype, n, isa)
    if narrow:
        wide //= 2
    room = torch.full((a.shape[0] + 2, wide + 5), 7.0)
    out = room[1:-1, 3:-2]
    if onto is not None:
        out[:] = 0.0
        out[:, :n] = onto
    native.require().tile_multiply(
        matrix(a),
        matrix(b),
        transposed,
        out.data_ptr(),
        room.stride(0),
        accumulate=onto is not None,
        narrow=narrow,
        isa=isa,
    )
    assert (room[0] == 7).all() and (room[-1] == 7).all()
    assert (room[:, :3] == 7).all() and (room[:, -2:] == 7).all()
    finite = a.isfinite().all(dim=1)
    assert (out[finite, n:] == 0).all()  # zero columns fill the panel
    return out[:, :n].clone()


def integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def normals(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_exact_on_integers(isa: str, a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    # every partial sum is below 2**24
    for m, n, k in SHAPES:
        a, b = integers(m, k, seed=1), integers(n, k, seed=2)
        exact = (a.double() @ b.double().T).float()
        a, b = a.to(a_dtype), b.to(b_dtype)
        assert torch.equal(multiply(a, b, isa), exact), (m, n, k)
        assert torch.equal(multiply(a, b.T.contiguous(), isa, transposed=False), exact), (m, n, k)
        onto = integers(m, n, seed=3)
        assert torch.equal(multiply(a, b, isa, onto=onto), exact + onto), (m, n, k)
        few = min(n, width(a_dtype, b_dtype, 1, isa) // 2)
        assert torch.equal(multiply(a, b[:few], isa, narrow=True), exact[:, :few]), (m, n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_fp32_accumulation(isa: str, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        a, b = normals(m, k, seed=4).to(dtype), normals(n, k, seed=5).to(dtype)
        left, right = a.double().numpy(), b.double().numpy()
        bound = (np.abs(left) @ np.abs(right).T) * (k + 1) * 2.0**-23
        assert (np.abs(multiply(a, b, isa).numpy() - left @ right.T) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_place(isa: str, dtype: torch.dtype) -> None:
    for k in (31, 600, 1101):
        a, b = normals(45, k, seed=6).to(dtype), normals(75, k, seed=7).to(dtype)
        whole = multiply(a, b, isa)
        for i, j in ((0, 0), (11, 31), (12, 32), (36, 16), (44, 74)):
            assert torch.equal(multiply(a[i : i + 1], b[j : j + 1], isa)[0, 0], whole[i, j])
            alone = multiply(a[i : i + 1], b[j : j + 1], isa, narrow=True)
            assert torch.equal(alone[0, 0], whole[i, j])
        assert torch.equal(multiply(a, b.T.contiguous(), isa, transposed=False), whole)
        rows, columns = torch.arange(44, -1, -1), torch.arange(74, -1, -1)
        assert torch.equal(multiply(a[rows], b[columns], isa)[rows][:, columns], whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_rows(isa: str, dtype: torch.dtype) -> None:
    store = integers(40, 131, seed=8).to(dtype)
    for start, k in ((1, 64), (3, 77), (0, 130)):
        a, b = store[3:36, start : start + k], store[:, start : start + k]
        exact = (a.double() @ b.double().T).float()
        assert torch.equal(multiply(a, b, isa), exact)
        tall = store[:, start : start + 60]
        exact = (store[:33, 1:41].double() @ tall.double()).float()
        assert torch.equal(multiply(store[:33, 1:41], tall, isa, transposed=False), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    # Odd k and incomplete tiles: what lies beyond an edge must not turn them into other NaNs.
    a, b = integers(14, 19, seed=9), integers(35, 19, seed=10).abs() + 1
    a[2, 18], a[13, 0], b[34, 18] = float("inf"), float("nan"), float("-inf")
    a, b = a.to(dtype), b.to(dtype)
    got = multiply(a, b, isa)
    expected = a.float() @ b.float().T
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
def test_every_fp16_number_is_widened_exactly(isa: str) -> None:
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    finite = every[every.isfinite()].view(-1, 1)
    assert torch.equal(multiply(finite, torch.ones(1, 1), isa), finite.float())
    assert torch.equal(multiply(torch.ones(1, 1), finite, isa), finite.float().T)
    odd = every[~every.isfinite()].view(-1, 1)
    got = multiply(odd, torch.ones(1, 1), isa)
    assert torch.equal(got.isnan(), odd.isnan())
    assert torch.equal(got.nan_to_num(), odd.float().nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
def test_no_inner_dimension_is_zero(isa: str) -> None:
    assert torch.equal(multiply(torch.zeros(5, 0), torch.zeros(9, 0), isa), torch.zeros(5, 9))


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 140),
    isa=st.sampled_from(ISAS),
    dtypes=st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))),
    transposed=st.booleans(),
    accumulate=st.booleans(),
)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    isa: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    transposed: bool,
    accumulate: bool,
) -> None:
    a = integers(m, k, seed=m).to(dtypes[0])
    b = (integers(n, k, seed=n) if transposed else integers(k, n, seed=n)).to(dtypes[1])
    onto = integers(m, n, seed=k) if accumulate else None
    exact = a.double() @ (b.double().T if transposed else b.double())
    if onto is not None:
        exact += onto
    assert torch.equal(multiply(a, b, isa, transposed=transposed, onto=onto), exact.float())


def test_unknown_and_missing_instruction_sets() -> None:
    a = torch.ones(1, 1)
    with pytest.raises(ValueError, match="known: scalar"):
        multiply(a, a, "mmx")
    if "amx_bf16" not in ISAS:
        with pytest.raises(ValueError, match="no amx_bf16"):
            multiply(a, a, "amx_bf16")
    assert "amx_emulated" not in native.require().cpu_isas()
