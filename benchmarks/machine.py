"""What a measurement was taken on, and how much memory it took."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from ume_models.commands.machine import cpu_name


def describe() -> dict[str, str | int]:
    """Processor, threads and versions, for ``extra_info`` of a benchmark."""
    from ume_kernels import native

    isa = "none" if native.module is None else native.module.cpu_isa()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "native_isa": isa,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def reset_peak_memory() -> None:
    """Start a new peak of the process's resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of resident memory at the highest point since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell the peak of resident memory")
