"""What this machine is, for reports: a figure without its machine means nothing."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

# What the CPU kernels and the libraries below them can use.
_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "sve",
)  # fmt: skip


def cpu_name() -> str:
    """Model name of the CPU as the system tells it, else its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Vector and matrix extensions the system reports; empty where it does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [name for name in _FEATURES if name in present]


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that wanted to run during the last minute, None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def memory_gib() -> float | None:
    """Physical memory in GiB, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return None


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
