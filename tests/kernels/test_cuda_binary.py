"""What nvcc makes of the CUDA C++ kernels: registers, spills, and the instructions they are for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

_BUDGET = re.compile(r"Budget: (\d+) registers")
_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Expected:
    """How many kernels a source has, what for, and what each must be made of."""

    gencode: str
    kernels: int
    instructions: tuple[str, ...]
    budgets: str = ""
    """Where the budgets are written, when it is not in the source itself."""


AMPERE = "arch=compute_80,code=sm_80"
HOPPER = "arch=compute_90a,code=sm_90a"
SOURCES = {
    "contrastive_loss_sm80": Expected(AMPERE, 4, ("HMMA", "LDGSTS", "LDSM")),
    "similarity_topk_sm80": Expected(AMPERE, 2, ("HMMA", "LDGSTS", "LDSM")),
    "contrastive_loss_sm90": Expected(
        HOPPER, 4, ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"), "include/ume/cuda/launch_sm90.cuh"
    ),
    "similarity_topk_sm90": Expected(
        HOPPER, 2, ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"), "include/ume/cuda/launch_sm90.cuh"
    ),
}


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    report: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Every source compiled once, two at a time."""
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(name: str) -> Compiled:
        cubin = folder / f"{name}.cubin"
        command = [
            str(NVCC), "-O3", "-std=c++17", f"-gencode={SOURCES[name].gencode}", "-cubin",
            "-Xptxas=-v", f"-I{CSRC / 'include'}", str(CSRC / "cuda" / f"{name}.cu"),
            "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Compiled(cubin, done.stderr)

    with ThreadPoolExecutor(2) as pool:
        slowest_first = sorted(SOURCES, reverse=True, key=lambda name: "sm90" in name)
        return dict(zip(slowest_first, pool.map(compile_one, slowest_first), strict=True))


def test_every_generation_is_listed() -> None:
    assert set(SOURCES) == {path.stem for path in (CSRC / "cuda").glob("*_sm[0-9]*.cu")}


@pytest.mark.parametrize("name", SOURCES)
def test_registers_and_spills(compiled: dict[str, Compiled], name: str) -> None:
    expected = SOURCES[name]
    written = CSRC / (expected.budgets or f"cuda/{name}.cu")
    budgets = [int(found) for found in _BUDGET.findall(written.read_text(encoding="utf-8"))]
    assert budgets, f"{written} states no budget"
    kernels = _KERNEL.findall(compiled[name].report)
    assert len(kernels) == expected.kernels, compiled[name].report
    for kernel, stack, stores, loads, registers in kernels:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), kernel
        assert int(registers) <= max(budgets), kernel


@pytest.mark.parametrize("name", SOURCES)
def test_instructions(compiled: dict[str, Compiled], name: str) -> None:
    program = shutil.which("cuobjdump")
    if program is None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("neither the CUDA toolkit nor Triton has cuobjdump here")
        import triton

        program = triton.knobs.nvidia.cuobjdump.path
    command = [program, "-sass", str(compiled[name].cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = text.split("Function :")[1:]
    assert len(kernels) == SOURCES[name].kernels
    for kernel in kernels:
        for instruction in SOURCES[name].instructions:
            assert re.search(rf"\b{instruction}\b", kernel), (instruction, kernel[:200])
