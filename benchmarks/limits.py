"""The least time that work can take here: bytes at the memory's bandwidth, operations at the peak.

On a GPU, from its data sheet (``benchmarks.datasheets``); on a CPU, from its best product and a
plain read, measured once in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from benchmarks.cost import Work
from benchmarks.datasheets import this_gpu
from benchmarks.floor import Machine, measure
from benchmarks.scale import scale


@cache
def machine() -> Machine | None:
    """Limits of this run's device; None for a try and for a GPU without a data sheet."""
    if scale().tiny:
        return None
    if scale().device.type == "cuda":
        gpu = this_gpu()
        return None if gpu is None else Machine(gpu.operations, gpu.bandwidth)
    return measure()


def floor(parts: Sequence[Work]) -> float | None:
    """Seconds that parts take one after the other at the limits; None where those are unknown."""
    limits = machine()
    if limits is None:
        return None
    return sum(max(part.bytes / limits.bandwidth, part.operations / limits.flops) for part in parts)
