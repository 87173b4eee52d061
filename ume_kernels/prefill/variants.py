"""Every prefill kernel with every shipped configuration, at Qwen2-VL-2B sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ume_kernels.aot import Budget, Variant
from ume_kernels.prefill import triton_kernels as kernels
from ume_kernels.tuning import Config, shipped

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1536, 12, 2, 128

_FIXED = {"eps": "fp32", "Slots_ptr": "*i64", "Positions_ptr": "*i64"}
_RAGGED = ("eps", "heads", "kv_heads", "slots_count")


def _variant(
    name: str, kernel: Any, dtype: str, constexprs: Mapping[str, Any], config: Config, b: Budget
) -> Variant:
    signature = {}
    for arg in kernel.arg_names:
        if arg in constexprs:
            signature[arg] = "constexpr"
        else:
            signature[arg] = _FIXED.get(arg, f"*{dtype}" if arg.endswith("_ptr") else "i32")
    divisible = tuple(a for a in signature if a not in constexprs and a not in _RAGGED)
    return Variant(name, kernel, signature, constexprs, config["num_warps"], 1, divisible, b)


def _of(kernel: str, name: str, config: Config, dtype: str) -> Iterator[Variant]:
    if kernel == "rms_norm":
        block = {"BLOCK": 1 << (HIDDEN - 1).bit_length()}
        yield _variant(
            name, kernels._rms_norm_kernel, dtype, block, config, kernels.RMS_NORM_BUDGET
        )
    elif kernel == "rope_append":
        half = HEAD_DIM // 2
        for second in (0, half):
            sizes = {
                "HALF": half,
                "SECOND": second,
                "BLOCK_HALF": half,
                "BLOCK_H": 1 << (HEADS - 1).bit_length(),
                "BLOCK_KV": KV_HEADS,
            }
            label = f"{name}_{'whole' if second else 'half'}"
            budget = kernels.ROPE_APPEND_BUDGET
            yield _variant(label, kernels._rope_append_kernel, dtype, sizes, config, budget)
    else:
        block = {"BLOCK": config["BLOCK"]}
        yield _variant(
            name, kernels._silu_mul_kernel, dtype, block, config, kernels.SILU_MUL_BUDGET
        )


def variants() -> Iterator[Variant]:
    """bfloat16 for every entry; float16 and float32 for the first of each kernel."""
    seen: set[str] = set()
    for file, kernel, config in shipped("prefill"):
        label = f"{kernel}_{file}_{config['max_rows'] or 'more'}"
        dtypes = ["bf16"] if kernel in seen else ["bf16", "fp16", "fp32"]
        seen.add(kernel)
        for dtype in dtypes:
            yield from _of(kernel, f"{label}_{dtype}", config, dtype)
