"""Ahead-of-time compilation of the Triton kernels: resources and occupancy without a GPU.

Every room with Triton kernels lists its launches in ``variants.py``. ``python -m ume_kernels.aot``
compiles each for the supported architectures with the compiler that Triton ships, reads registers,
local memory and shared memory from the binary, and holds them against the budget written beside
the kernel. Nothing here imports Triton before it compiles.
"""

from ume_kernels.aot.occupancy import ARCHITECTURES, Architecture, Occupancy, occupancy
from ume_kernels.aot.variant import ROOMS, Budget, Compiled, Variant, judge

__all__ = [
    "ARCHITECTURES",
    "ROOMS",
    "Architecture",
    "Budget",
    "Compiled",
    "Occupancy",
    "Variant",
    "judge",
    "occupancy",
]
