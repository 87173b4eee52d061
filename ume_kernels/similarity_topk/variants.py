"""The scan with every shipped configuration, for compile checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ume_kernels.aot import Budget, Variant
from ume_kernels.similarity_topk import triton_kernels as kernels
from ume_kernels.tuning import Config, shipped

_FIXED = {
    "buffer_ptr": "*i64",
    "worst_ptr": "*i64",
    "threshold_ptr": "*i32",
    "has_nan_ptr": "*i32",
    "q_inv_ptr": "*fp32",
    "c_inv_ptr": "*fp32",
    "allowed_ptr": "*u8",
    "bits_ptr": "*i32",
    "mask_ptr": "*u8",
    "first": "i64",
}
_RAGGED = (
    "bits_stride", "mask_stride", "width", "buffer_stride", "queries", "candidates", "first", "k",
    "tiles_per_split",
)  # fmt: skip
# What a launch leaves out: everything optional, the masks only, nothing.
_ABSENT = {
    "": ("q_inv_ptr", "c_inv_ptr", "allowed_ptr", "bits_ptr"),
    "_weighted": ("allowed_ptr", "bits_ptr"),
    "_full": (),
}


def _variant(
    name: str, kernel: Any, dtype: str, config: Config, absent: tuple[str, ...], budget: Budget
) -> Variant:
    # where nothing is left out, with a masked tail of K, too
    values: dict[str, Any] = {"EVEN_K": bool(absent), **dict.fromkeys(absent), **config}
    values = {k: v for k, v in values.items() if k in kernel.arg_names}
    signature = {}
    for arg in kernel.arg_names:
        if arg in values:
            signature[arg] = "constexpr"
        else:
            signature[arg] = _FIXED.get(arg, f"*{dtype}" if arg.endswith("_ptr") else "i32")
    divisible = tuple(a for a in signature if a not in values and a not in _RAGGED)
    return Variant(
        name, kernel, signature, values, config["num_warps"], config.get("STAGES", 1), divisible,
        budget,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """bfloat16 and float16 for every entry, float32 for its own; see ``_ABSENT``."""
    k = kernels
    for file, kernel, config in shipped("similarity_topk"):
        label = f"{kernel}_{file}_{config['max_rows'] or 'more'}"
        launches = [("bf16", ""), ("fp16", "_weighted")]
        if kernel.endswith("_selective"):
            launches = [("bf16", "_full"), ("fp16", "_full")]
        elif kernel.endswith("_float32"):
            launches = [("fp32", "_full")]
        for dtype, which in launches:
            yield _variant(
                f"{label}_{dtype}{which}", k._scan_kernel, dtype, config, _ABSENT[which],
                k.SCAN_BUDGET,
            )  # fmt: skip
    words = {"WORDS": k.BITS_WORDS, "num_warps": 4}
    yield _variant("bits", k._bits_kernel, "i32", words, (), k.BITS_BUDGET)
