"""What nvcc makes of the CUDA C++ kernels: registers, spills, and the instructions they are for."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Plain `pytest` leaves the root, where benchmarks/ is, out of the path.
sys.path.insert(0, str(ROOT))

from benchmarks.cuda_binaries import CSRC, SOURCES, Kernel, compile_all, cuobjdump  # noqa: E402

NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    assert NVCC is not None
    return compile_all(NVCC)


def budget(source: str) -> int:
    """The largest number of registers that the source allows itself."""
    file = CSRC / "include/ume/cuda/launch_sm90.cuh"
    if "sm80" in source:
        file = CSRC / "cuda" / f"{source}.cu"
    stated = re.findall(r"Budget: (\d+) registers", file.read_text(encoding="utf-8"))
    assert stated, f"{file} states no budget"
    return max(map(int, stated))


def test_every_generation_is_listed() -> None:
    assert set(SOURCES) == {path.stem for path in (CSRC / "cuda").glob("*_sm[0-9]*.cu")}


def test_registers_and_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        assert 0 < kernel.registers <= budget(kernel.source), kernel


def test_instructions(kernels: list[Kernel]) -> None:
    if cuobjdump() is None:
        pytest.skip("neither the CUDA toolkit nor Triton has cuobjdump here")
    for kernel in kernels:
        assert set(kernel.instructions) == set(SOURCES[kernel.source].instructions), kernel
        assert all(kernel.instructions.values()), kernel
