"""The CPU kernel of similarity_topk on every instruction set, against plain loops and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ume_kernels import native
from ume_kernels.similarity_topk import keys as key_format
from ume_kernels.similarity_topk import native as kernels

if native.module is None:
    pytest.skip(str(native.missing), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = list(native.require().cpu_isas())
if "avx512f" in ISAS:  # what the loops around the matrix tiles need
    ISAS.append("amx_emulated")
CPU = torch.device("cpu")


def integers(*shape: int, seed: int, limit: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def normals(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty(q: torch.Tensor, k: int) -> torch.Tensor:
    return key_format.empty_keys(q.shape[0], k, CPU)


def ranked(keys: torch.Tensor) -> tuple[list[list[float]], list[list[int]]]:
    scores, indices = key_format.unpack(keys.sort(dim=1, descending=True).values)
    return scores.tolist(), indices.tolist()


def loop(
    scores: np.ndarray, k: int, allowed: np.ndarray | None = None, first: int = 0
) -> tuple[list[list[float]], list[list[int]]]:
    """The k best of each row, one pair after another: the definition."""
    values, places = [], []
    for i, row in enumerate(scores):
        order = [
            j
            for j in range(len(row))
            if allowed is None or (allowed[j] if allowed.ndim == 1 else allowed[i, j])
        ]
        order.sort(key=lambda j: (-row[j], j))
        order = order[:k]
        gap = k - len(order)
        values.append([float(row[j]) for j in order] + [float("-inf")] * gap)
        places.append([first + j for j in order] + [-1] * gap)
    return values, places


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("c_dtype", DTYPES)
def test_exact_on_integers(isa: str, q_dtype: torch.dtype, c_dtype: torch.dtype) -> None:
    # Small integers: exact scores, and ties everywhere.
    for queries, candidates, d, k in (
        (1, 1, 1, 1),
        (1, 2077, 33, 10),
        (3, 50, 7, 5),
        (17, 301, 33, 10),
        (33, 97, 64, 97),
    ):
        q = integers(queries, d, seed=1, limit=2).to(q_dtype)
        c = integers(candidates, d, seed=2, limit=2).to(c_dtype)
        keys, has_nan = kernels.scan(q, c, 0, empty(q, k), isa=isa, threads=2)
        assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), k)
        assert not has_nan


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_real_numbers(isa: str, dtype: torch.dtype) -> None:
    q, c = normals(40, 129, seed=3).to(dtype), normals(700, 129, seed=4).to(dtype)
    q_inv, c_inv = normals(40, seed=5).abs(), normals(700, seed=6).abs()
    keys, _ = kernels.scan(q, c, 0, empty(q, 20), q_inv=q_inv, c_inv=c_inv, isa=isa, threads=2)
    scores, indices = key_format.unpack(keys.sort(dim=1, descending=True).values)
    exact = (q.double() @ c.double().T) * q_inv[:, None].double() * c_inv.double()
    assert torch.allclose(scores.double(), exact.gather(1, indices), rtol=1e-5, atol=1e-5)
    # The set is right but for pairs that fp32 cannot tell apart.
    assert torch.allclose(scores.double(), exact.topk(20).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 100, 129, 400, 1500])
def test_many_results(isa: str, k: int) -> None:
    q, c = integers(9, 12, seed=7), integers(1500, 12, seed=8)
    keys, _ = kernels.scan(q, c, 0, empty(q, k), isa=isa, threads=2)
    assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_queries_than_are_packed_at_a_time(dtype: torch.dtype) -> None:
    q, c = integers(530, 16, seed=9).to(dtype), integers(400, 16, seed=10).to(dtype)
    keys, _ = kernels.scan(q, c, 0, empty(q, 3), threads=2)
    assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_batch_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    q, c = normals(70, 75, seed=11).to(dtype), normals(1200, 75, seed=12).to(dtype)
    c[600:900] = c[300:600]  # ties of real numbers
    one = kernels.scan(q, c, 0, empty(q, 30), isa=isa, threads=1)[0].sort(dim=1).values
    for threads in (2, 3, 7):
        got = kernels.scan(q, c, 0, empty(q, 30), isa=isa, threads=threads)[0]
        assert torch.equal(got.sort(dim=1).values, one)
    for part in (slice(0, 1), slice(16, 32), slice(5, 60)):
        got = kernels.scan(q[part], c, 0, empty(q[part], 30), isa=isa, threads=2)[0]
        assert torch.equal(got.sort(dim=1).values, one[part])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (9, 1), (70, 33), (1500, 64)])
def test_a_single_query_is_scored_as_among_others(
    isa: str, dtype: torch.dtype, rows: int, width: int
) -> None:
    q, c = normals(3, width, seed=3).to(dtype), normals(2 * rows, width, seed=4).to(dtype)[::2]
    c[rows // 2, 0] = float("nan")
    allowed = torch.arange(3 * rows).reshape(3, rows) % 5 != 1
    for mask in (None, allowed):
        options = {"q_inv": normals(3, seed=5), "c_inv": normals(rows, seed=6), "isa": isa}
        together, nan = kernels.scan(q, c, 0, empty(q, min(rows, 10)), allowed=mask, **options)
        for i in range(3):
            one = options | {"q_inv": options["q_inv"][i : i + 1]}
            only = None if mask is None else mask[i : i + 1]
            alone, alone_nan = kernels.scan(
                q[i : i + 1], c, 0, empty(q[:1], min(rows, 10)), allowed=only, threads=2, **one
            )
            assert torch.equal(alone.sort().values, together[i : i + 1].sort().values)
            assert alone_nan <= nan
            assert alone_nan == (only is None or bool(only[0, rows // 2]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["rising", "falling", "twice"])
def test_merges_into_the_keys_so_far(isa: str, order: str) -> None:
    q, c = integers(20, 10, seed=13, limit=2), integers(800, 10, seed=14, limit=2)
    parts = [(0, 300), (300, 301), (301, 800)]
    if order == "falling":
        parts.reverse()
    keys = empty(q, 25)
    for start, stop in parts:
        before = keys.clone()
        merged, _ = kernels.scan(q, c[start:stop], start, keys, isa=isa, threads=2)
        assert torch.equal(keys, before)  # the argument is left alone
        keys = merged
    if order == "twice":  # the same scores at later indices: they lose every tie
        keys, _ = kernels.scan(q, c, len(c), keys, isa=isa, threads=2)
        twice = torch.cat([c, c])
        assert ranked(keys) == loop((q.double() @ twice.double().T).numpy(), 25)
        return
    assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), 25)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ["shared", "per query", "strided"])
def test_only_allowed_candidates_count(isa: str, shape: str) -> None:
    q, c = integers(21, 10, seed=15), integers(333, 10, seed=16)
    allowed = torch.rand(21, 400, generator=torch.Generator().manual_seed(17)) < 0.3
    allowed[3] = False
    allowed = allowed[0, :333] if shape == "shared" else allowed[:, :333]
    if shape == "per query":
        allowed = allowed.contiguous()
    keys, _ = kernels.scan(q, c, 7, empty(q, 60), allowed=allowed, isa=isa, threads=2)
    assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), 60, allowed.numpy(), first=7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_rows(isa: str, dtype: torch.dtype) -> None:
    store = integers(200, 101, seed=18).to(dtype)
    for q, c in (
        (store[:9, 1:65], store[9:, 3:67]),
        (store[:18:2, 5:36], store[18::3, 1:32]),
        (store[:9].T[:64, :9].T, store.T[1:65].T),
        (store[:5, :64].T.contiguous().T, store[:, :64].T.contiguous().T),
    ):
        keys, _ = kernels.scan(q, c, 0, empty(q, 6), isa=isa, threads=2)
        assert ranked(keys) == loop((q.double() @ c.double().T).numpy(), 6)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_reported_only_where_it_counts(isa: str) -> None:
    q, c = integers(18, 9, seed=19), integers(120, 9, seed=20)
    c[77, 8] = float("nan")
    expected = (q.double() @ c.double().T).numpy()
    keys, has_nan = kernels.scan(q, c, 0, empty(q, 4), isa=isa)
    assert has_nan
    finite = torch.ones(120, dtype=torch.bool)
    finite[77] = False
    assert ranked(keys) == loop(expected, 4, finite.numpy())  # never a wrong index
    for allowed in (finite, finite.expand(18, 120)):
        keys, has_nan = kernels.scan(q, c, 0, empty(q, 4), allowed=allowed, isa=isa)
        assert not has_nan
    one = finite.repeat(18, 1)
    one[17, 77] = True
    assert kernels.scan(q, c, 0, empty(q, 4), allowed=one, isa=isa)[1]
    # A NaN after the lists are full
    late = torch.cat([integers(900, 9, seed=21), c[77:78]])
    assert kernels.scan(q, late, 0, empty(q, 1), isa=isa)[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores_are_ranked(isa: str, dtype: torch.dtype) -> None:
    q = torch.ones(5, 3).to(dtype)
    c = torch.ones(70, 3)
    c[40, 0], c[3, 1] = float("inf"), float("-inf")
    c = c.to(dtype)
    keys, has_nan = kernels.scan(q, c, 0, empty(q, 70), isa=isa)
    assert not has_nan  # not even of the columns that fill up the panel
    assert ranked(keys) == loop((q.float() @ c.float().T).numpy(), 70)
    assert ranked(keys)[1][0][0] == 40 and ranked(keys)[1][0][-1] == 3


def test_negative_zero_ties_with_zero() -> None:
    q, c = torch.tensor([[1.0]]), torch.tensor([[-0.0], [0.0], [-0.0]])
    scores, indices = ranked(kernels.scan(q, c, 0, empty(q, 3), threads=1)[0])
    assert scores == [[0.0, 0.0, 0.0]]
    assert indices == [[0, 1, 2]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("c_dtype", DTYPES)
def test_segments_have_the_scores_of_the_scan(
    isa: str, q_dtype: torch.dtype, c_dtype: torch.dtype
) -> None:
    q, c = normals(12, 61, seed=22).to(q_dtype), normals(200, 61, seed=23).to(c_dtype)
    q_inv, c_inv = normals(12, seed=24).abs(), normals(200, seed=25).abs()
    whole, _ = kernels.scan(q, c, 0, empty(q, 200), q_inv=q_inv, c_inv=c_inv, isa=isa, threads=1)
    whole = whole.sort(dim=1, descending=True).values
    generator = torch.Generator().manual_seed(26)
    lists = [torch.randperm(200, generator=generator)[:n] for n in (0, 1, 5, 47, 48, 49, 200) * 2][
        :12
    ]
    offsets = torch.tensor([0, *(len(x) for x in lists)]).cumsum(0)
    for k in (1, 5, 60):
        for threads in (1, 3):
            keys, has_nan = kernels.scan_segments(
                q,
                c,
                offsets,
                torch.cat(lists),
                k,
                q_inv=q_inv,
                c_inv=c_inv,
                isa=isa,
                threads=threads,
            )
            assert not has_nan
            _, indices = key_format.unpack(whole)
            for i, rows in enumerate(lists):
                mine = whole[i][torch.isin(indices[i], rows)][:k]
                expected = torch.full((k,), key_format.EMPTY)
                expected[: len(mine)] = mine
                assert torch.equal(keys[i].sort(descending=True).values, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_segments_name_rows_from_the_first_and_report_nan(isa: str) -> None:
    q, c = integers(2, 8, seed=27), integers(30, 8, seed=28)
    c[4, 0] = float("nan")
    offsets, rows = torch.tensor([0, 3, 5]), torch.tensor([9, 2, 5, 4, 9])
    keys, has_nan = kernels.scan_segments(q, c, offsets, rows, 3, first=100, isa=isa)
    assert has_nan
    places = ranked(keys)[1]
    assert sorted(places[0]) == [102, 105, 109]
    assert places[1] == [109, -1, -1]
    assert not kernels.scan_segments(q, c, torch.tensor([0, 3, 3]), rows, 3, isa=isa)[1]


def test_segments_refuse_what_is_not_there() -> None:
    q, c = integers(2, 8, seed=29), integers(5, 8, seed=30)
    for wrong in (5, -1):
        rows = torch.tensor([0, wrong])
        with pytest.raises(IndexError, match="row"):
            kernels.scan_segments(q, c, torch.tensor([0, 1, 2]), rows, 1)
    for offsets in ([0, 1], [0, 2, 1], [0, 1, 3], [-1, 1, 2]):
        with pytest.raises(ValueError, match="offsets"):
            kernels.scan_segments(q, c, torch.tensor(offsets), torch.tensor([0, 1]), 1)


def test_refuses_operands_that_do_not_fit() -> None:
    q, c = integers(2, 8, seed=31), integers(5, 8, seed=32)
    with pytest.raises(ValueError, match="length"):
        kernels.scan(q, c[:, :7], 0, empty(q, 1))
    with pytest.raises(ValueError, match="k must"):
        kernels.scan(q, c, 0, empty(q, 0))
    with pytest.raises(ValueError, match="allowed"):
        kernels.scan(q, c, 0, empty(q, 1), allowed=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="factors"):
        kernels.scan(q, c, 0, empty(q, 1), q_inv=torch.ones(3))
    assert kernels.check([q, c]) is None
    assert kernels.check([q.double(), c]) is not None
    assert kernels.check([q.to("meta"), c]) is not None


def test_nothing_to_scan_changes_nothing() -> None:
    q, c = integers(2, 8, seed=33), integers(5, 8, seed=34)
    keys = kernels.scan(q, c, 0, empty(q, 2))[0]
    assert torch.equal(kernels.scan(q, c[:0], 5, keys)[0], keys)
    assert kernels.scan(q[:0], c, 0, keys[:0])[0].shape == (0, 2)
    none = torch.zeros(1, dtype=torch.int64)
    assert kernels.scan_segments(q[:0], c, none, none[:0], 2)[0].shape == (0, 2)


@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, 70))
    candidates = data.draw(st.integers(1, 400))
    d = data.draw(st.integers(1, 50))
    k = data.draw(st.integers(1, candidates + 3))
    q = integers(queries, d, seed=data.draw(st.integers(0, 99)), limit=3)
    c = integers(candidates, d, seed=data.draw(st.integers(0, 99)), limit=3)
    q = q.to(data.draw(st.sampled_from(DTYPES)))
    c = c.to(data.draw(st.sampled_from(DTYPES)))
    isa = data.draw(st.sampled_from(ISAS))
    threads = data.draw(st.integers(1, 3))
    shape = data.draw(st.sampled_from([None, (candidates,), (queries, candidates)]))
    allowed = None if shape is None else integers(*shape, seed=1, limit=1) > 0
    cut = data.draw(st.integers(0, candidates))
    keys = empty(q, k)
    for part in (slice(0, cut), slice(cut, candidates)):
        mask = None if allowed is None else allowed[..., part]
        keys, _ = kernels.scan(q, c[part], part.start, keys, allowed=mask, isa=isa, threads=threads)
    expected = loop(
        (q.double() @ c.double().T).numpy(), k, None if allowed is None else allowed.numpy()
    )
    assert ranked(keys) == expected
