"""What a measurement was taken on, and how much memory it took."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from ume_models.machine import cpu_name, memory_gib, usable_cores


def describe() -> dict[str, str | int]:
    """Processor, threads and versions, for ``extra_info`` of a benchmark."""
    from ume_kernels import native

    isa = "none" if native.module is None else native.module.cpu_isa()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "native_isa": isa,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; None for what is not installed."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for name in ("ume-kernels", "torch", "triton", "transformers", "numpy", "pillow", "faiss-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def this_machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU, for the head of a file of results."""
    about: dict[str, Any] = {
        key: value for key, value in describe().items() if key not in ("torch", "transformers")
    }
    memory = memory_gib()
    about["memory_gib"] = None if memory is None else round(memory, 1)
    about["gpu"] = gpu()
    return about


@cache
def _nvml() -> tuple[Any, Any] | None:
    """NVML and the handle of CUDA's first device; None without either. Read-only use."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By bus address: NVML and CUDA may count devices differently.
        properties = torch.cuda.get_device_properties(0)
        address = (
            f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}"
            f":{properties.pci_device_id:02x}.0"
        )
        return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    except (pynvml.NVMLError, AttributeError):
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError:
            return None


def _ask(call: str, *arguments: Any) -> Any:
    """One NVML query; None where the device or the driver does not answer it."""
    found = _nvml()
    if found is None:
        return None
    nvml, handle = found
    try:
        return getattr(nvml, call)(handle, *arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def gpu_state() -> dict[str, float] | None:
    """Clocks (MHz), power (W), temperature (°C) and used memory now; None without NVML.

    Read while work is queued: an idle GPU lowers its clocks within milliseconds.
    """
    found = _nvml()
    if found is None:
        return None
    nvml = found[0]
    memory = _ask("nvmlDeviceGetMemoryInfo")
    power = _ask("nvmlDeviceGetPowerUsage")
    state = {
        "sm_mhz": _ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_mhz": _ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1000,
        "temperature_c": _ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "memory_bytes": None if memory is None else memory.used,
        "throttle_reasons": _ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
    }
    return {name: float(value) for name, value in state.items() if value is not None}


def energy_meter() -> Callable[[], float | None] | None:
    """A function that tells the joules the GPU has used since the driver started; None without.

    From NVML's counter (Volta and later), which moves in steps of some ten milliseconds.
    """
    if _ask("nvmlDeviceGetTotalEnergyConsumption") is None:
        return None

    def joules() -> float | None:
        value = _ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else value / 1000

    return joules


def gpu() -> dict[str, Any] | None:
    """The GPU: name, driver, size, and its state now; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    found = _nvml()
    driver = None if found is None else found[0].nvmlSystemGetDriverVersion()
    return {
        "name": properties.name,
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "power_limit_w": (_ask("nvmlDeviceGetEnforcedPowerLimit") or 0) / 1000 or None,
        "max_sm_mhz": None
        if found is None
        else _ask("nvmlDeviceGetMaxClockInfo", found[0].NVML_CLOCK_SM),
        "state": gpu_state(),
    }


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Start a new peak of the process's resident memory (Linux), or of what a GPU holds."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device | None = None) -> int:
    """Bytes of resident memory, or on the GPU, at the highest point since the last reset."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell the peak of resident memory")
