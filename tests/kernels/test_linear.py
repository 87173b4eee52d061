"""ume_kernels.linear and its native kernel, against exact integers, float64 and F.linear."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ume_kernels import native
from ume_kernels.dispatch import Backend, BackendError, select
from ume_kernels.linear import linear
from ume_kernels.linear.op import MAX_ROWS, _max_rows

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))
ISAS = [] if native.module is None else list(native.module.cpu_isas())
BF16, FP32 = torch.bfloat16, torch.float32
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])

# Around the vector widths (8, 16, 32), the tile of 16 weight rows, the blocks of 2, 3, 4 and 16
# rows, and the chunks of 256 fp32 elements.
ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 33)
SIZES = ((1, 1), (3, 7), (15, 31), (16, 32), (17, 33), (40, 100), (18, 257), (5, 2049), (33, 8960))


def kernel(dtype: torch.dtype) -> Callable[..., None]:
    module = native.require()
    return module.linear_bf16 if dtype is BF16 else module.linear_fp32


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    isa: str | None = None,
    threads: int = 2,
) -> torch.Tensor:
    """The bare kernel, on a chosen instruction set."""
    y = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=x.dtype)
    kernel(x.dtype)(
        y.data_ptr(),
        x.data_ptr(),
        w.data_ptr(),
        0 if b is None else b.data_ptr(),
        *(x.shape[0], w.shape[0], w.shape[1]),
        *(x.stride(0), w.stride(0)),
        threads,
        isa,
    )
    return y


def integers(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def normals(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_exact_on_integers(isa: str, n: int, k: int, dtype: torch.dtype) -> None:
    # Every partial sum is below 2**24, so fp32 is exact and, in bf16, one rounding remains. Sums
    # above 256 meet its ties.
    w, b = integers(n, k, seed=1, dtype=dtype), integers(n, seed=2, dtype=dtype)
    for m in ROWS:
        x = integers(m, k, seed=m, dtype=dtype)
        exact = x.double() @ w.double().T
        assert torch.equal(run(x, w, None, isa), exact.to(dtype))
        assert torch.equal(run(x, w, b, isa), (exact + b.double()).to(dtype))


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_error_is_one_rounding_and_fp32_accumulation(
    isa: str, n: int, k: int, dtype: torch.dtype
) -> None:
    x, w, b = (
        normals(16, k, seed=1, dtype=dtype),
        normals(n, k, seed=2, dtype=dtype),
        normals(n, seed=3, dtype=dtype),
    )
    exact = x.double() @ w.double().T + b.double()
    magnitude = x.double().abs() @ w.double().abs().T + b.double().abs()
    rounding = 2.0**-8 if dtype is BF16 else 0.0
    bound = exact.abs() * rounding + magnitude * (k + 1) * 2.0**-24
    error = (run(x, w, b, isa).double() - exact).abs()
    assert (error <= bound).all()


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_does_not_depend_on_its_batch(isa: str, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, b = (
        normals(40, k, seed=4, dtype=dtype),
        normals(n, k, seed=5, dtype=dtype),
        normals(n, seed=6, dtype=dtype),
    )
    alone = torch.cat([run(x[i : i + 1], w, b, isa) for i in range(len(x))])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    for m in ROWS:
        assert torch.equal(run(x[:m], w, b, isa), alone[:m])
        assert torch.equal(run(x[order[:m]], w, b, isa), alone[order[:m]])
    spoiled = x.clone()
    spoiled[1:] = float("nan")
    assert torch.equal(run(spoiled, w, b, isa)[0], alone[0])


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_bits(isa: str, dtype: torch.dtype) -> None:
    x, w = normals(5, 333, seed=1, dtype=dtype), normals(100, 333, seed=2, dtype=dtype)
    one = run(x, w, isa=isa, threads=1)
    for threads in (2, 3, 64):
        assert torch.equal(run(x, w, isa=isa, threads=threads), one)


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
def test_special_values(isa: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).to(dtype)
    x = torch.tensor([[inf, 1.0], [nan, 1.0], [torch.finfo(dtype).max, 1.0]]).to(dtype)
    y = run(x, w, isa=isa).float()
    assert y[0, 0] == inf
    assert y[0, 1] == -inf
    assert y[1].isnan().tolist() == [True, True, True]  # 0 * nan is nan
    largest = torch.finfo(dtype).max
    assert y[2].tolist() == [largest, -largest, 1.0]
    doubled = run(x[2:], w * 2, isa=isa).float()
    assert doubled[0].tolist() == [inf, -inf, 2.0]


@needs_native
@both_dtypes
@pytest.mark.parametrize("isa", ISAS)
def test_writes_nothing_but_its_output(isa: str, dtype: torch.dtype) -> None:
    x, w = normals(3, 50, seed=1, dtype=dtype), normals(21, 50, seed=2, dtype=dtype)
    room = torch.full((16 + 3 * 21 + 64,), 7.0, dtype=dtype)
    kernel(dtype)(room[16:].data_ptr(), x.data_ptr(), w.data_ptr(), 0, 3, 21, 50, 50, 50, 2, isa)
    assert (room[:16] == 7).all()
    assert (room[16 + 63 :] == 7).all()
    assert torch.equal(room[16 : 16 + 63].view(3, 21), run(x, w, isa=isa))


GUARDED = """
import ctypes, itertools, mmap, torch
from ume_kernels import native
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
keep = []
def guarded(values):  # the last byte is the last before a page that may not be read
    size = values.numel() * values.element_size()
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    keep.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = base + pages * page
    if libc.mprotect(ctypes.c_void_p(end), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memmove(end - size, values.data_ptr(), size)
    return end - size
calls = {torch.bfloat16: native.module.linear_bf16, torch.float32: native.module.linear_fp32}
for isa, dtype in itertools.product(native.module.cpu_isas(), calls):
    for m, n, k in ((1, 17, 33), (4, 5, 31), (7, 16, 8), (3, 1, 1), (17, 19, 63), (2, 3, 259)):
        x, w, b = (torch.randn(*s).to(dtype) for s in ((m, k), (n, k), (n,)))
        y = torch.empty(m, n, dtype=dtype)
        expected = torch.empty_like(y)
        call = calls[dtype]
        call(expected.data_ptr(), x.data_ptr(), w.data_ptr(), b.data_ptr(), m, n, k, k, k, 2, isa)
        call(y.data_ptr(), guarded(x), guarded(w), guarded(b), m, n, k, k, k, 2, isa)
        assert torch.equal(y, expected), (isa, dtype)
print("inside")
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
def test_reads_nothing_beyond_its_inputs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "inside"


ONE_POOL = """
import os, torch
torch.set_num_threads(2)
big = torch.randn(600, 600)
(big @ big).sum(); torch.relu(torch.randn(4_000_000))
before = len(os.listdir("/proc/self/task"))
from ume_kernels import linear
x, w = torch.randn(4, 256).bfloat16(), torch.randn(4096, 256).bfloat16()
for _ in range(3):
    linear(x, w, backend="native"); torch.relu(torch.randn(4_000_000))
print(before, len(os.listdir("/proc/self/task")))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and the glibc linker's log")
def test_shares_the_thread_pool_of_torch() -> None:
    if not native.require().openmp:
        pytest.skip("built without OpenMP")
    done = subprocess.run(
        [sys.executable, "-c", ONE_POOL],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_DEBUG": "bindings"},
    )
    before, after = map(int, done.stdout.split())
    assert after == before  # no second pool
    bound = {}
    for line in done.stderr.splitlines():
        if "binding file" in line and "`GOMP_parallel'" in line:
            user, _, rest = line.split("binding file ")[1].partition(" [0] to ")
            bound[os.path.basename(user).split(".")[0]] = rest.split(" [0]")[0]
    if not bound:
        pytest.skip("the dynamic linker keeps no log")
    assert "_C" in bound
    assert len(set(bound.values())) == 1  # one OpenMP runtime for everybody


@needs_native
@both_dtypes
def test_callable_from_many_threads(dtype: torch.dtype) -> None:
    x, w = normals(4, 96, seed=1, dtype=dtype), normals(64, 96, seed=2, dtype=dtype)
    expected = run(x, w)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(linear(x, w, backend="native"), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_native
@both_dtypes
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (2, 1, 1, 48)])
def test_shapes_of_f_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = (
        integers(*shape, seed=1, dtype=dtype),
        integers(10, 48, seed=2, dtype=dtype),
        integers(10, seed=3, dtype=dtype),
    )
    for bias in (None, b):
        y = linear(x, w, bias, backend="native")
        assert y.shape == F.linear(x, w, bias).shape
        assert torch.equal(y, F.linear(x, w, bias))


@needs_native
@both_dtypes
def test_strided_inputs(dtype: torch.dtype) -> None:
    wide = integers(12, 80, seed=1, dtype=dtype)
    x = integers(40, 6, seed=2, dtype=dtype).T  # columns are contiguous, rows are not
    w = wide[:, :40]
    assert torch.equal(linear(x, w, backend="native"), F.linear(x, w))
    with pytest.raises(BackendError, match="contiguous"):
        linear(x, integers(40, 12, seed=3, dtype=dtype).T, backend="native")


@both_dtypes
def test_close_to_f_linear_at_model_size(dtype: torch.dtype) -> None:
    x, w, b = (
        normals(16, 1536, seed=1, dtype=dtype),
        normals(256, 1536, seed=2, dtype=dtype),
        normals(256, seed=3, dtype=dtype),
    )
    # Two fp32 accumulations in different order; in bf16 each is rounded once, and so they are at
    # most one step apart.
    rtol, atol = (2.0**-7, 1e-3) if dtype is BF16 else (1e-6, 1e-4)
    assert_close(linear(x, w, b), F.linear(x, w, b), rtol=rtol, atol=atol)


@needs_native
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize("k", [768, 2048, 8960])
def test_fp32_is_as_accurate_as_torch(isa: str, k: int) -> None:
    x, w = normals(16, k, seed=1, dtype=FP32), normals(200, k, seed=2, dtype=FP32)
    exact = x.double() @ w.double().T

    def error(y: torch.Tensor) -> float:
        return float((y.double() - exact).square().mean().sqrt())

    assert error(run(x, w, isa=isa)) <= 2 * error(F.linear(x, w))


class TestChoice:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    w = torch.zeros(4, 8, dtype=torch.bfloat16)

    @pytest.fixture(autouse=True)
    def no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("UME_BACKEND", raising=False)

    @pytest.mark.skipif(len(ISAS) < 2, reason="no vector instructions or no native module")
    @both_dtypes
    def test_few_rows_are_native(self, dtype: torch.dtype) -> None:
        x, w = self.x.to(dtype), self.w.to(dtype)
        assert select("linear", x, w, None) is Backend.NATIVE
        assert select("linear", x, w, w.new_zeros(4)) is Backend.NATIVE
        full = x[:1].expand(_max_rows[dtype], 8)
        assert select("linear", full, w, None) is Backend.NATIVE

    @both_dtypes
    def test_the_rest_is_torch(self, dtype: torch.dtype) -> None:
        def chosen(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> Backend:
            return select("linear", x, w, b)

        x, w, other = self.x.to(dtype), self.w.to(dtype), FP32 if dtype is BF16 else BF16
        assert chosen(torch.zeros(MAX_ROWS + 1, 8, dtype=dtype), w) is Backend.TORCH
        assert chosen(x.half(), w.half()) is Backend.TORCH
        assert chosen(x.double(), w.double()) is Backend.TORCH
        assert chosen(x, w.to(other)) is Backend.TORCH
        assert chosen(x.to(other), w) is Backend.TORCH
        assert chosen(x, w, torch.zeros(4, dtype=other)) is Backend.TORCH
        assert chosen(x[:0], w) is Backend.TORCH
        assert chosen(x, w.new_zeros(8, 4).T) is Backend.TORCH
        assert chosen(x.to("meta"), w.to("meta")) is Backend.TORCH
        assert chosen(x, torch.nn.Parameter(w)) is Backend.TORCH

    @pytest.mark.parametrize("compiled", [False, True])
    def test_autocast_casts(self, compiled: bool) -> None:
        call = torch.compile(linear, backend="aot_eager", fullgraph=True) if compiled else linear
        x, w = self.x.float(), self.w.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x, w).dtype is BF16
        assert call(x, w).dtype is FP32

    @both_dtypes
    def test_gradients_flow(self, dtype: torch.dtype) -> None:
        w = torch.nn.Parameter(integers(4, 8, seed=1, dtype=dtype))
        x = integers(2, 8, seed=2, dtype=dtype)
        linear(x, w).sum().backward()
        assert torch.equal(w.grad, x.sum(0).expand(4, 8))
        with torch.no_grad():
            assert not linear(x, w).requires_grad

    @both_dtypes
    def test_environment_forces_torch(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        monkeypatch.setenv("UME_BACKEND", "torch")
        x, w = normals(3, 1000, seed=1, dtype=dtype), normals(50, 1000, seed=2, dtype=dtype)
        assert torch.equal(linear(x, w), F.linear(x, w))
        assert select("linear", x, w, None) is Backend.TORCH

    def test_insisting_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(BackendError, match="native"):
            linear(self.x.half(), self.w.half(), backend="native")
        monkeypatch.setenv("UME_BACKEND", "linear:native")
        with pytest.raises(BackendError, match="native"):
            linear(self.x.half(), self.w.half())

    def test_shape_errors_are_torchs(self) -> None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(self.x[:, :5], self.w)


class TestCompile:
    @both_dtypes
    def test_traces_in_one_graph(self, dtype: torch.dtype) -> None:
        x, w, b = (
            integers(3, 40, seed=1, dtype=dtype),
            integers(20, 40, seed=2, dtype=dtype),
            integers(20, seed=3, dtype=dtype),
        )

        def double(x: torch.Tensor) -> torch.Tensor:
            return linear(x, w, b) * 2

        compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), double(x))

    @both_dtypes
    def test_operator_is_well_formed(self, dtype: torch.dtype) -> None:
        x, w, b = (
            integers(2, 3, 40, seed=1, dtype=dtype),
            integers(20, 40, seed=2, dtype=dtype),
            integers(20, seed=3, dtype=dtype),
        )
        for bias in (None, b):
            torch.library.opcheck(torch.ops.ume.linear.default, (x, w, bias))

    @both_dtypes
    def test_training_graph_has_gradients(self, dtype: torch.dtype) -> None:
        w = torch.nn.Parameter(integers(20, 40, seed=2, dtype=dtype))
        x = integers(3, 40, seed=1, dtype=dtype)
        torch.compile(linear, backend="aot_eager", fullgraph=True)(x, w).sum().backward()
        assert torch.equal(w.grad, x.sum(0).expand(20, 40))
