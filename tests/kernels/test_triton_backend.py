"""ume_kernels.triton_backend: when kernels can run, and what a failed compile does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ume_kernels import dispatch, triton_backend
from ume_kernels.dispatch import Backend, BackendError, Obstacle

if importlib.util.find_spec("triton"):
    # It decides once whether it interprets: not while a test here has the variable unset.
    import triton.language  # noqa: F401

HERE = Path(__file__).parent
PLAIN = torch.zeros(2)


class OnCuda:
    """Stands for a tensor on a GPU that is not there."""

    is_cpu = False
    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, index: int = 0) -> None:
        self.dtype = dtype
        self.device = torch.device("cuda", index)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("UME_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "_broken", {})
    monkeypatch.setattr(triton_backend, "_installed", lambda: True)
    monkeypatch.setattr(triton_backend, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(
        dispatch,
        "_OPERATIONS",
        {
            "toy": {
                Backend.TRITON: lambda tensors: triton_backend.check("toy", tensors),
                Backend.TORCH: dispatch.always,
            }
        },
    )
    dispatch._parse.cache_clear()
    yield
    dispatch._parse.cache_clear()


def reason(obstacle: Obstacle | None) -> str:
    assert obstacle is not None
    assert not obstacle.soft
    return obstacle.reason


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tensors in ((), (PLAIN,)):
        obstacle = triton_backend.check("toy", tensors)
        assert reason(obstacle) == "Triton is not installed"
        assert obstacle is not None
        assert obstacle.missing == "triton"
        assert "triton>=3.6" in str(obstacle.remedy)


def test_not_advised_where_it_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    obstacle = triton_backend.check("toy", ())
    assert reason(obstacle).startswith("no CUDA device")
    assert obstacle is not None
    assert obstacle.missing is None


def test_the_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in reason(triton_backend.check("toy", ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_backend.check("toy", ()) is None


@pytest.mark.parametrize("value", ["", "0"])
def test_interpreter_switched_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert not triton_backend.interpreting()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreter_runs_on_cpu_tensors_when_asked(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors = (PLAIN.to(dtype), None)
    for given in ((), tensors):
        obstacle = triton_backend.check("toy", given)
        # It can, but it is slow: only for those who ask for it.
        assert obstacle is not None and obstacle.soft
    assert dispatch.select("toy", *tensors) is Backend.TORCH
    assert dispatch.select("toy", *tensors, backend="triton") is Backend.TRITON


def test_interpreter_refuses_what_it_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16 wrongly" in reason(triton_backend.check("toy", (PLAIN.bfloat16(),)))
    assert "CPU tensors only" in reason(triton_backend.check("toy", (OnCuda(),)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_takes_every_type(dtype: torch.dtype) -> None:
    assert triton_backend.check("toy", (OnCuda(dtype), None)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((PLAIN,), "tensors are on cpu"),
        ((OnCuda(torch.float64),), "no kernel for torch.float64"),
        ((OnCuda(), PLAIN), "different devices"),
        ((OnCuda(index=0), None, OnCuda(index=1)), "different devices"),
    ],
)
def test_unfit_tensors(tensors: tuple[torch.Tensor, ...], words: str) -> None:
    assert words in reason(triton_backend.check("toy", tensors))


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool) -> None:
    monkeypatch.setattr(triton_backend, "_capability", lambda index: capability)
    obstacle = triton_backend.check("toy", (OnCuda(),))  # type: ignore[arg-type]
    if runs:
        assert obstacle is None
    else:
        assert reason(obstacle) == "compute capability 7.5 is below 8.0"


def compilation_error() -> Exception:
    errors = pytest.importorskip("triton.compiler.errors", reason="Triton is not installed")
    error: Exception = errors.CompilationError("x = y", None, "y is not defined")
    return error


def out_of_resources() -> Exception:
    runtime = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    error: Exception = runtime.OutOfResources(300_000, 232_448, "shared memory")
    return error


def ptxas_error() -> Exception:
    runtime = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    error: Exception = runtime.PTXASError("ptxas: unknown opcode")
    return error


def no_compiler() -> Exception:
    return RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def failing_compiler() -> Exception:
    return subprocess.CalledProcessError(1, ["gcc", "launcher.c"])


def failed_pass() -> Exception:
    # what MLIR's Python binding raises when a pass of the compiler fails
    return RuntimeError("PassManager::run failed")


FAILURES = [
    compilation_error,
    out_of_resources,
    ptxas_error,
    no_compiler,
    failing_compiler,
    failed_pass,
]


def failing(error: Exception) -> Callable[[], str]:
    def kernels() -> str:
        raise error

    return kernels


@pytest.mark.parametrize("make", FAILURES)
def test_a_failed_compile_warns_once_and_falls_back(make: Callable[[], Exception]) -> None:
    with pytest.warns(RuntimeWarning, match="'toy' do not compile here, PyTorch runs") as caught:
        assert triton_backend.attempt("toy", failing(make()), lambda: "torch") == "torch"
    assert len(caught) == 1
    # From then on the backend is passed over, so the kernels are not tried again …
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obstacle = triton_backend.check("toy", ())
        assert obstacle is not None and obstacle.soft
        assert dispatch.select("toy") is Backend.TORCH
    # … and the report says why.
    report = dispatch.explain("toy")
    assert report.reason.startswith("no triton: its kernels did not compile: ")
    assert type(make()).__name__ in report.reason


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_failed_compile_raises_when_insisted(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("UME_BACKEND", "triton")
    error = compilation_error()
    with pytest.raises(BackendError, match="'toy' do not compile: CompilationError") as caught:
        triton_backend.attempt(
            "toy", failing(error), lambda: "torch", "triton" if how == "argument" else None
        )
    assert caught.value.__cause__ is error


def test_results_and_other_errors_pass_through() -> None:
    assert triton_backend.attempt("toy", lambda: "kernel", lambda: "torch") == "kernel"
    # The state of a device is unknown after a fault, and a bug is not a compile failure.
    for error in (RuntimeError("CUDA error: an illegal memory access"), IndexError("bug")):
        pytest.importorskip("triton", reason="Triton is not installed")
        with pytest.raises(type(error), match=str(error)):
            triton_backend.attempt("toy", failing(error), lambda: "torch")
    assert triton_backend._broken == {}


SCRIPT = """
import warnings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from toy_kernels.triton_kernels import _broken_kernel
from ume_kernels import triton_backend

def kernels():
    source = ASTSource(_broken_kernel, {"Y_ptr": "*fp32", "X_ptr": "*fp32"}, {}, {})
    triton.compile(source, target=GPUTarget("cuda", 80, 32))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert triton_backend.attempt("toy", kernels, lambda: "torch") == "torch"
ours = [w for w in caught if w.category is RuntimeWarning]
assert len(ours) == 1, caught
print(ours[0].message)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_kernel_that_really_does_not_compile() -> None:
    paths = [str(HERE.parent.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "the Triton kernels of 'toy' do not compile here" in done.stdout
    assert "cannot add pointers together" in done.stdout
