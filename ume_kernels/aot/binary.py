"""Reads resources and instructions from a compiled kernel, with the tools that Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", re.MULTILINE)
_GROUPS = {
    "async_copy": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "mma": ("HMMA", "HGMMA", "IMMA", "DMMA"),
    "local": ("LDL", "STL"),
}


@dataclass(frozen=True)
class Binary:
    """Resources of a kernel: registers and bytes of local memory per thread.

    ``instructions`` counts the opcodes of ``_GROUPS`` in the machine code. Shared memory is not
    here: Triton's is all dynamic, and what an sm_90 binary shows is the driver's reserve.
    """

    registers: int
    local: int
    instructions: dict[str, int]


def inspect(cubin: bytes) -> Binary:
    """Resources and instruction counts of a cubin with one kernel.

    Raises:
        RuntimeError: ``cuobjdump`` prints something else than expected.
        subprocess.CalledProcessError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _cuobjdump("-res-usage", path)
        machine_code = _cuobjdump("-sass", path)
    found = _RESOURCES.findall(resources)
    opcodes = _OPCODE.findall(machine_code)
    if len(found) != 1 or not opcodes:
        raise RuntimeError(f"cannot read the output of cuobjdump: {resources[:500]!r}")
    registers, stack, local = map(int, found[0])
    counts = {name: sum(code in group for code in opcodes) for name, group in _GROUPS.items()}
    return Binary(registers, stack + local, counts)


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
