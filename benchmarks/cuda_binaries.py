"""``python -m benchmarks.cuda_binaries``: what nvcc makes of the CUDA C++ kernels. Needs no GPU.

Compiles each file for the architecture it is written for and reports registers, spills, shared
memory and the instructions that the kernels exist for, per kernel.

    python -m benchmarks.cuda_binaries --json FILE
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Source:
    """A file of csrc/cuda: its architecture, and what each of its kernels must be made of."""

    gencode: str
    kernels: int
    instructions: tuple[str, ...]


_AMPERE = ("arch=compute_80,code=sm_80", ("HMMA", "LDGSTS", "LDSM"))
_HOPPER = ("arch=compute_90a,code=sm_90a", ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"))
SOURCES: Mapping[str, Source] = {
    "contrastive_loss_sm80": Source(_AMPERE[0], 4, _AMPERE[1]),
    "similarity_topk_sm80": Source(_AMPERE[0], 2, _AMPERE[1]),
    "contrastive_loss_sm90": Source(_HOPPER[0], 4, _HOPPER[1]),
    "similarity_topk_sm90": Source(_HOPPER[0], 2, _HOPPER[1]),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: registers per thread at launch, bytes of stack and of spill traffic, and
    how often each opcode of ``Source.instructions`` occurs."""

    source: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    instructions: dict[str, int]


def cuobjdump() -> str | None:
    """The program of the CUDA toolkit, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = str(triton.knobs.nvidia.cuobjdump.path)
    return found


def compile_source(name: str, nvcc: str, disassembler: str | None) -> list[Kernel]:
    """The kernels of one file; without a disassembler their instructions are not counted.

    Raises:
        RuntimeError: it does not compile, or the compiler's report cannot be read.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        command = [
            nvcc, "-O3", "-std=c++17", f"-gencode={source.gencode}", "-cubin", "-Xptxas=-v",
            f"-I{CSRC / 'include'}", str(CSRC / "cuda" / f"{name}.cu"), "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile: {done.stderr}")
        counts = _instructions(cubin, disassembler, source.instructions)
    kernels = [
        Kernel(name, kernel, *map(int, (registers, *memory)), counts.get(kernel, {}))
        for kernel, *memory, registers in _KERNEL.findall(done.stderr)
    ]
    if len(kernels) != source.kernels:
        raise RuntimeError(f"{name}: expected {source.kernels} kernels: {done.stderr}")
    return kernels


def _instructions(
    cubin: Path, disassembler: str | None, opcodes: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    if disassembler is None:
        return {}
    command = [disassembler, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function :")[1:]:
        found[part.split()[0]] = {code: len(re.findall(rf"\b{code}\b", part)) for code in opcodes}
    return found


def compile_all(nvcc: str) -> list[Kernel]:
    """Every source, two at a time, the slowest first."""
    names = sorted(SOURCES, reverse=True, key=lambda name: "sm90" in name)
    program = cuobjdump()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda name: compile_source(name, nvcc, program), names))
    return [kernel for kernels in found for kernel in kernels]


def main() -> None:
    """Print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not on PATH: install the CUDA toolkit")
    kernels = compile_all(nvcc)
    for kernel in kernels:
        spills = kernel.stack + kernel.spill_stores + kernel.spill_loads
        print(
            f"{kernel.source:22} {kernel.name[:60]:60} {kernel.registers:3} registers, "
            f"{spills} bytes of stack and spills, {kernel.instructions}"
        )
    if arguments.json:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        value = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S+00:00"),
            "nvcc": version.stdout.strip().splitlines()[-1],
            "kernels": [asdict(kernel) for kernel in kernels],
        }
        arguments.json.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
