"""Blocks and warps that a multiprocessor holds at once, from a kernel's resources.

The arithmetic of NVIDIA's occupancy calculator: registers are handed out to warps in steps, each
quarter of a multiprocessor has its own, and every block takes a reserve of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
REGISTER_STEP = 256
"""Registers are allocated to a warp in multiples of this."""
PARTITIONS = 4
"""Quarters of a multiprocessor; a warp's registers come from one of them."""
SHARED_STEP = 128
SHARED_RESERVED = 1024
"""Shared memory the driver takes in every block."""


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor; sizes in bytes, shared memory per block without reserve."""

    shared: int
    shared_per_block: int
    threads: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(shared=164 << 10, shared_per_block=163 << 10, threads=2048, blocks=32),
    90: Architecture(shared=228 << 10, shared_per_block=227 << 10, threads=2048, blocks=32),
}
"""By compute capability × 10: A100, H100 and H200."""


@dataclass(frozen=True)
class Occupancy:
    """What fits on a multiprocessor and which resource runs out first (``limit``)."""

    blocks: int
    warps: int
    limit: str


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(arch: int, num_warps: int, registers: int, shared: int) -> Occupancy:
    """Blocks per multiprocessor = the least of what each resource allows.

    Args:
        arch: key of ``ARCHITECTURES``.
        num_warps: warps per block.
        registers: registers per thread.
        shared: bytes of shared memory per block, without the driver's reserve.
    """
    limits = ARCHITECTURES[arch]
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_STEP)
    warps = PARTITIONS * (REGISTERS // PARTITIONS // per_warp)
    allowed = {
        "registers": warps // num_warps,
        "shared memory": limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_STEP),
        "threads": limits.threads // (num_warps * WARP),
        "blocks": limits.blocks,
    }
    if shared > limits.shared_per_block:
        allowed["shared memory"] = 0
    limit = min(allowed, key=lambda name: allowed[name])
    return Occupancy(allowed[limit], allowed[limit] * num_warps, limit)
