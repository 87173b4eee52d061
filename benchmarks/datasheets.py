"""What vendors state of GPUs, by the name that the driver gives the device.

The only home of these figures. A name that is not listed has none: part of a name tells too
little (a GH200 is no H200, the PCIe cards have other memory than the SXM modules).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cost import Work


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bf16 products (operations/s) and bandwidth (bytes/s), from the data sheet."""

    name: str
    operations: float
    bandwidth: float

    def moving(self, work: Work) -> float:
        """Seconds for the bytes alone."""
        return work.bytes / self.bandwidth

    def computing(self, work: Work) -> float:
        """Seconds for the operations alone."""
        return work.operations / self.operations


A100_80G = Gpu("A100-80G", 312e12, 2.039e12)
H100_SXM = Gpu("H100-SXM", 989e12, 3.35e12)
H200 = Gpu("H200", 989e12, 4.8e12)

BY_NAME = {
    "NVIDIA A100-SXM4-40GB": Gpu("A100-SXM-40G", 312e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Gpu("A100-PCIe-40G", 312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": A100_80G,
    "NVIDIA A100 80GB PCIe": Gpu("A100-PCIe-80G", 312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": Gpu("H100-PCIe", 756e12, 2.0e12),
    "NVIDIA H100 NVL": Gpu("H100-NVL", 835e12, 3.9e12),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": Gpu("H200-NVL", 835e12, 4.8e12),
}
"""Whole names, as NVML and ``torch.cuda.get_device_name`` report them. A MIG slice has another."""


def this_gpu() -> Gpu | None:
    """The data sheet of CUDA's first device; None without a device or for a name not listed."""
    if not torch.cuda.is_available():
        return None
    return BY_NAME.get(torch.cuda.get_device_name(0))
