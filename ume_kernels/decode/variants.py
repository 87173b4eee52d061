"""Every decode kernel with every shipped configuration, for compile checks at 2B sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ume_kernels.aot import Budget, Variant
from ume_kernels.decode import triton_attention, triton_projections
from ume_kernels.decode.op import MAX_TILE
from ume_kernels.tuning import Config, shipped

# Arguments of a fixed type, whatever the dtype of the model.
_FIXED = {
    "lengths_ptr": "*i64",
    "offsets_ptr": "*i64",
    "slots_ptr": "*i64",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "counter_ptr": "*i32",
    "eps": "fp32",
    "scale": "fp32",
}
# Sizes that are not multiples of 16 in general.
_RAGGED = ("rows", "extra", "eps", "scale", "split_blocks", "slot_count")

_QKV = {
    "QUERIES": 1, "HEADS": 12, "KV_HEADS": 2, "HALF_DIM": 64, "HAS_BIAS": True, "HAS_OFFSETS": True
}  # fmt: skip
_ATTEND = {"HAS_SLOTS": False, "GROUP": 6, "KV_HEADS": 2, "HEAD_DIM": 128, "BLOCK_D": 128}


def _variant(
    name: str, kernel: Any, dtype: str, constexprs: Mapping[str, Any], config: Config, b: Budget
) -> Variant:
    tiles = {k: v for k, v in config.items() if k in kernel.arg_names}
    values = {**constexprs, **tiles}
    signature = {}
    for arg in kernel.arg_names:
        if arg in values:
            signature[arg] = "constexpr"
        elif arg in _FIXED:
            signature[arg] = _FIXED[arg]
        else:
            signature[arg] = f"*{dtype}" if arg.endswith("_ptr") else "i32"
    divisible = tuple(a for a in signature if a not in values and a not in _RAGGED)
    stages = config.get("STAGES", 1)
    return Variant(name, kernel, signature, values, config["num_warps"], stages, divisible, b)


def _of(kernel: str, label: str, config: Config, dtype: str) -> Iterator[Variant]:
    name = f"{label}_{dtype}"
    prenorm = {"PRENORM": dtype == "fp16"}
    p, a = triton_projections, triton_attention
    if kernel == "qkv":
        yield _variant(name, p._qkv_kernel, dtype, {**_QKV, **prenorm}, config, p.QKV_BUDGET)
    elif kernel == "gate_up":
        yield _variant(name, p._gate_up_kernel, dtype, prenorm, config, p.GATE_UP_BUDGET)
    elif kernel in ("o", "down"):
        yield _variant(name, p._residual_kernel, dtype, {}, config, p.RESIDUAL_BUDGET)
    else:
        limit = config["max_rows"] or MAX_TILE
        for queries in (1, 5, 8):
            block_q = max(16, 1 << (6 * queries - 1).bit_length())
            if block_q <= limit:
                for splits in (1, 8):
                    sizes = {"QUERIES": queries, "SPLITS": splits, "BLOCK_Q": block_q}
                    yield _variant(
                        f"{name}_q{queries}_s{splits}", a._attend_kernel, dtype,
                        {**_ATTEND, **sizes}, config, a.ATTEND_BUDGET,
                    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """bfloat16 for every entry, float16 and float32 for the first of each projection."""
    seen: set[str] = set()
    for file, kernel, config in shipped("decode"):
        if config.get("gemm") == "cublas":
            continue
        label = f"{kernel}_{file}_{config['max_rows'] or 'more'}"
        dtypes = ["bf16"] if kernel in seen else ["bf16", "fp16", "fp32"]
        if kernel.startswith("attend"):
            dtypes = ["fp32"] if kernel == "attend_fp32" else ["bf16"]
        seen.add(kernel)
        for dtype in dtypes:
            yield from _of(kernel, label, config, dtype)
