"""One launch of one kernel: what to compile, what it may use, and what it did use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ume_kernels.aot.occupancy import Occupancy

ROOMS = ("moe_transition", "decode", "prefill", "contrastive_loss", "similarity_topk")
"""Folders of ``ume_kernels`` with Triton kernels and a ``variants.py``."""


@dataclass(frozen=True)
class Budget:
    """What every configuration of a kernel must keep to; spilling is never within it.

    Attributes:
        registers: most registers per thread.
        shared: most bytes of shared memory per block.
        blocks_per_sm: fewest blocks that must fit on a multiprocessor.
    """

    registers: int
    shared: int
    blocks_per_sm: int


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and compile-time values of one launch.

    Attributes:
        name: unique in its room; begins with the name of the kernel in the tuning table.
        kernel: the function under ``@triton.jit``.
        signature: type of every argument (``"*bf16"``, ``"i32"``, ``"fp32"``; compile-time ones
            ``"constexpr"``).
        constexprs: value of every compile-time argument.
        num_warps: warps per block.
        num_stages: depth of software pipelining.
        divisible: arguments (pointers, strides, sizes) that are multiples of 16 at launch.
        budget: what it may use.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...]
    budget: Budget


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled variant and where it breaks its budget (``failures``).

    Attributes:
        registers: per thread.
        shared: bytes per block, without the driver's reserve.
        local: bytes of stack and local memory per thread: spilled registers.
        instructions: how often the instructions worth knowing occur in the machine code:
            ``async_copy`` (global → shared), ``mma`` (tensor cores), ``local`` (spill traffic).
        occupancy: None if it does not compile.
    """

    room: str
    name: str
    arch: int
    num_warps: int
    budget: Budget
    registers: int = 0
    shared: int = 0
    local: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    occupancy: Occupancy | None = None
    failures: tuple[str, ...] = ()


def judge(
    budget: Budget, registers: int, shared: int, local: int, occupancy: Occupancy
) -> tuple[str, ...]:
    """In words, everything that is outside the budget."""
    found = []
    if local:
        found.append(f"spills: {local} bytes of local memory per thread")
    if registers > budget.registers:
        found.append(f"{registers} registers, budget {budget.registers}")
    if shared > budget.shared:
        found.append(f"{shared} bytes of shared memory, budget {budget.shared}")
    if occupancy.blocks < budget.blocks_per_sm:
        found.append(
            f"{occupancy.blocks} blocks per multiprocessor ({occupancy.limit}), "
            f"budget {budget.blocks_per_sm}"
        )
    return tuple(found)
