"""One variant for each outcome."""

from __future__ import annotations

from collections.abc import Iterator

from toy_kernels import triton_kernels as kernels
from ume_kernels.aot import Budget, Variant

POINTERS = ("Y_ptr", "X_ptr")
ROOMY = Budget(registers=255, shared=160_000, blocks_per_sm=1)


def scale(name: str, budget: Budget) -> Variant:
    signature = {"Y_ptr": "*bf16", "X_ptr": "*bf16", "n": "i32", "factor": "fp32"}
    return Variant(
        name,
        kernels._scale_kernel,
        {**signature, "BLOCK": "constexpr"},
        {"BLOCK": 1024},
        num_warps=4,
        num_stages=1,
        divisible=POINTERS,
        budget=budget,
    )


def product(name: str, rows: int, columns: int, num_warps: int, budget: Budget) -> Variant:
    constexprs = {"M": rows, "N": columns, "BLOCK": 64, "STAGES": 3}
    pointers = ("Y_ptr", "A_ptr", "B_ptr")
    return Variant(
        name,
        kernels._product_kernel,
        {**dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(pointers, "*bf16"), "K": "i32"},
        constexprs,
        num_warps=num_warps,
        num_stages=3,
        divisible=(*pointers, "K"),
        budget=budget,
    )


def variants() -> Iterator[Variant]:
    yield scale("good", Budget(registers=64, shared=0, blocks_per_sm=16))
    yield scale("too many registers", Budget(registers=8, shared=0, blocks_per_sm=16))
    yield product("product", 64, 64, 4, ROOMY)
    yield product("too much shared memory", 64, 64, 4, Budget(255, 1024, 1))
    yield product("too few blocks", 64, 64, 4, Budget(255, 160_000, 32))
    yield product("spilling", 128, 128, 1, ROOMY)
    yield Variant(
        "broken", kernels._broken_kernel, {"Y_ptr": "*fp32", "X_ptr": "*fp32"}, {}, 4, 1, (), ROOMY
    )
