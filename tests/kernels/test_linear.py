"""ume_kernels.linear and its native kernel, against exact integers, float64 and F.linear."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

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

# Around the vector widths (8, 16, 32), the tile of 16 weight rows and the blocks of 4 and 16 rows.
ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 33)
SIZES = ((1, 1), (3, 7), (15, 31), (16, 32), (17, 33), (40, 100), (5, 2049), (33, 8960))


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    isa: str | None = None,
    threads: int = 2,
) -> torch.Tensor:
    """The bare kernel, on a chosen instruction set."""
    y = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=torch.bfloat16)
    native.require().linear_bf16(
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


def integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).bfloat16()


def normals(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_exact_on_integers(isa: str, n: int, k: int) -> None:
    # Every partial sum is below 2**24, so fp32 is exact and one rounding to bf16 remains. Sums
    # above 256 meet its ties.
    w, b = integers(n, k, seed=1), integers(n, seed=2)
    for m in ROWS:
        x = integers(m, k, seed=m)
        exact = x.double() @ w.double().T
        assert torch.equal(run(x, w, None, isa), exact.bfloat16())
        assert torch.equal(run(x, w, b, isa), (exact + b.double()).bfloat16())


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_error_is_one_rounding_and_fp32_accumulation(isa: str, n: int, k: int) -> None:
    x, w, b = normals(16, k, seed=1), normals(n, k, seed=2), normals(n, seed=3)
    exact = x.double() @ w.double().T + b.double()
    magnitude = x.double().abs() @ w.double().abs().T + b.double().abs()
    bound = exact.abs() * 2.0**-8 + magnitude * (k + 1) * 2.0**-24
    error = (run(x, w, b, isa).double() - exact).abs()
    assert (error <= bound).all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_does_not_depend_on_its_batch(isa: str, n: int, k: int) -> None:
    x, w, b = normals(40, k, seed=4), normals(n, k, seed=5), normals(n, seed=6)
    alone = torch.cat([run(x[i : i + 1], w, b, isa) for i in range(len(x))])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    for m in ROWS:
        assert torch.equal(run(x[:m], w, b, isa), alone[:m])
        assert torch.equal(run(x[order[:m]], w, b, isa), alone[order[:m]])
    spoiled = x.clone()
    spoiled[1:] = float("nan")
    assert torch.equal(run(spoiled, w, b, isa)[0], alone[0])


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_bits(isa: str) -> None:
    x, w = normals(5, 333, seed=1), normals(100, 333, seed=2)
    one = run(x, w, isa=isa, threads=1)
    for threads in (2, 3, 64):
        assert torch.equal(run(x, w, isa=isa, threads=threads), one)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_special_values(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).bfloat16()
    x = torch.tensor([[inf, 1.0], [nan, 1.0], [3.3895e38, 1.0]]).bfloat16()
    y = run(x, w, isa=isa).float()
    assert y[0, 0] == inf
    assert y[0, 1] == -inf
    assert y[1].isnan().tolist() == [True, True, True]  # 0 * nan is nan
    largest = torch.finfo(torch.bfloat16).max
    assert y[2].tolist() == [largest, -largest, 1.0]
    doubled = run(x[2:], w * 2, isa=isa).float()
    assert doubled[0].tolist() == [inf, -inf, 2.0]


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_writes_nothing_but_its_output(isa: str) -> None:
    x, w = normals(3, 50, seed=1), normals(21, 50, seed=2)
    room = torch.full((16 + 3 * 21 + 64,), 7.0, dtype=torch.bfloat16)
    native.require().linear_bf16(
        room[16:].data_ptr(), x.data_ptr(), w.data_ptr(), 0, 3, 21, 50, 50, 50, 2, isa
    )
    assert (room[:16] == 7).all()
    assert (room[16 + 63 :] == 7).all()
    assert torch.equal(room[16 : 16 + 63].view(3, 21), run(x, w, isa=isa))


GUARDED = """
import ctypes, mmap, sys, torch
from ume_kernels import native
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
keep = []
def guarded(values):  # the last byte is the last before a page that may not be read
    pages = -(-values.numel() * 2 // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    keep.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = base + pages * page
    if libc.mprotect(ctypes.c_void_p(end), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memmove(end - values.numel() * 2, values.data_ptr(), values.numel() * 2)
    return end - values.numel() * 2
for isa in native.module.cpu_isas():
    for m, n, k in ((1, 17, 33), (4, 5, 31), (7, 16, 8), (3, 1, 1), (17, 19, 63)):
        x, w, b = (torch.randn(*s).bfloat16() for s in ((m, k), (n, k), (n,)))
        y = torch.empty(m, n, dtype=torch.bfloat16)
        expected = torch.empty_like(y)
        call = native.module.linear_bf16
        call(expected.data_ptr(), x.data_ptr(), w.data_ptr(), b.data_ptr(), m, n, k, k, k, 2, isa)
        call(y.data_ptr(), guarded(x), guarded(w), guarded(b), m, n, k, k, k, 2, isa)
        assert torch.equal(y, expected), isa
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
def test_callable_from_many_threads() -> None:
    x, w = normals(4, 96, seed=1), normals(64, 96, seed=2)
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
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (2, 1, 1, 48)])
def test_shapes_of_f_linear(shape: tuple[int, ...]) -> None:
    x, w, b = integers(*shape, seed=1), integers(10, 48, seed=2), integers(10, seed=3)
    for bias in (None, b):
        y = linear(x, w, bias, backend="native")
        assert y.shape == F.linear(x, w, bias).shape
        assert torch.equal(y, F.linear(x, w, bias))


@needs_native
def test_strided_inputs() -> None:
    wide = integers(12, 80, seed=1)
    x = integers(40, 6, seed=2).T  # columns are contiguous, rows are not
    w = wide[:, :40]
    assert torch.equal(linear(x, w, backend="native"), F.linear(x, w))
    with pytest.raises(BackendError, match="contiguous"):
        linear(x, integers(40, 12, seed=3).T, backend="native")


def test_close_to_f_linear_at_model_size() -> None:
    x, w, b = normals(16, 1536, seed=1), normals(256, 1536, seed=2), normals(256, seed=3)
    # Two fp32 accumulations in different order, each rounded once: at most one bf16 step apart.
    assert_close(linear(x, w, b), F.linear(x, w, b), rtol=2.0**-7, atol=1e-3)


class TestChoice:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    w = torch.zeros(4, 8, dtype=torch.bfloat16)

    @pytest.fixture(autouse=True)
    def no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("UME_BACKEND", raising=False)

    @pytest.mark.skipif(len(ISAS) < 2, reason="no vector instructions or no native module")
    def test_few_bf16_rows_are_native(self) -> None:
        assert select("linear", self.x, self.w, None) is Backend.NATIVE
        full = self.x[:1].expand(_max_rows, 8)
        assert select("linear", full, self.w, None) is Backend.NATIVE

    def test_the_rest_is_torch(self) -> None:
        def chosen(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> Backend:
            return select("linear", x, w, b)

        many = torch.zeros(MAX_ROWS + 1, 8, dtype=torch.bfloat16)
        assert chosen(many, self.w) is Backend.TORCH
        assert chosen(self.x.float(), self.w.float()) is Backend.TORCH
        assert chosen(self.x, self.w, torch.zeros(4)) is Backend.TORCH
        assert chosen(self.x[:0], self.w) is Backend.TORCH
        assert chosen(self.x, self.w.new_zeros(8, 4).T) is Backend.TORCH
        assert chosen(self.x.to("meta"), self.w.to("meta")) is Backend.TORCH
        assert chosen(self.x, torch.nn.Parameter(self.w)) is Backend.TORCH

    def test_gradients_flow(self) -> None:
        w = torch.nn.Parameter(integers(4, 8, seed=1))
        x = integers(2, 8, seed=2)
        linear(x, w).sum().backward()
        assert torch.equal(w.grad, x.sum(0).expand(4, 8))
        with torch.no_grad():
            assert not linear(x, w).requires_grad

    def test_environment_forces_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UME_BACKEND", "torch")
        x, w = normals(3, 1000, seed=1), normals(50, 1000, seed=2)
        assert torch.equal(linear(x, w), F.linear(x, w))
        assert select("linear", x, w, None) is Backend.TORCH

    def test_insisting_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(BackendError, match="native"):
            linear(self.x.float(), self.w.float(), backend="native")
        monkeypatch.setenv("UME_BACKEND", "linear:native")
        with pytest.raises(BackendError, match="native"):
            linear(self.x.float(), self.w.float())

    def test_shape_errors_are_torchs(self) -> None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(self.x[:, :5], self.w)


class TestCompile:
    def test_traces_in_one_graph(self) -> None:
        x, w, b = integers(3, 40, seed=1), integers(20, 40, seed=2), integers(20, seed=3)

        def double(x: torch.Tensor) -> torch.Tensor:
            return linear(x, w, b) * 2

        compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), double(x))

    def test_operator_is_well_formed(self) -> None:
        x, w, b = integers(2, 3, 40, seed=1), integers(20, 40, seed=2), integers(20, seed=3)
        for bias in (None, b):
            torch.library.opcheck(torch.ops.ume.linear.default, (x, w, bias))

    def test_training_graph_has_gradients(self) -> None:
        w = torch.nn.Parameter(integers(20, 40, seed=2))
        x = integers(3, 40, seed=1)
        torch.compile(linear, backend="aot_eager", fullgraph=True)(x, w).sum().backward()
        assert torch.equal(w.grad, x.sum(0).expand(20, 40))
