"""The least time that work can take here: bytes at the memory's bandwidth, operations at the peak.

On a GPU of the table, from its data sheet; on a CPU, from its best product and a plain read,
measured once in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from benchmarks.cost import Work
from benchmarks.floor import Machine, measure
from benchmarks.roofline import GPUS
from benchmarks.scale import scale


@cache
def machine() -> Machine | None:
    """Limits of this run's device; None for a try and for a GPU that is not in the table."""
    if scale().tiny:
        return None
    if scale().device.type == "cuda":
        name = torch.cuda.get_device_name(0)
        for gpu in GPUS:
            if gpu.name.split("-")[0] in name:
                return Machine(gpu.operations, gpu.bandwidth)
        return None
    return measure()


def floor(parts: Sequence[Work]) -> float | None:
    """Seconds that parts take one after the other at the limits; None where those are unknown."""
    limits = machine()
    if limits is None:
        return None
    return sum(max(part.bytes / limits.bandwidth, part.operations / limits.flops) for part in parts)
