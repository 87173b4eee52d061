"""Every kernel of the contrastive loss with every shipped configuration, for compile checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ume_kernels.aot import Budget, Variant
from ume_kernels.contrastive_loss import triton_kernels as kernels
from ume_kernels.contrastive_loss import triton_weights
from ume_kernels.tuning import Config, shipped

_FIXED = {
    "row_mask_ptr": "*u8",
    "col_mask_ptr": "*u8",
    "row_group_ptr": "*i32",
    "col_group_ptr": "*i32",
    "ignore_start_ptr": "*i64",
    "ignore_col_ptr": "*i32",
    "hard_index_ptr": "*i32",
    "hard_index_out_ptr": "*i64",
}
_INPUTS = ("q_ptr", "p_ptr", "u_ptr")
_RAGGED = ("first_row", "stop_row", "M", "offset", "width", "tiles")

_KERNELS: Mapping[str, tuple[Any, Budget]] = {
    "partials": (kernels._partials_kernel, kernels.PARTIALS_BUDGET),
    "weights": (triton_weights.weights_kernel, triton_weights.WEIGHTS_BUDGET),
    "merge": (kernels._merge_kernel, kernels.MERGE_BUDGET),
}
# What the plain symmetric loss leaves out; everything else is present in the other variant.
_PLAIN = (
    "row_mask_ptr", "col_mask_ptr", "row_group_ptr", "col_group_ptr", "ignore_start_ptr",
    "ignore_col_ptr", "row_limit_ptr", "col_limit_ptr", "hard_ptr", "hard_index_ptr",
    "hard_out_ptr", "hard_index_out_ptr", "state_max_ptr", "state_sum_ptr",
)  # fmt: skip


def _variant(name: str, of: str, dtype: str, config: Config, full: bool) -> Variant:
    kernel, budget = _KERNELS[of]
    # the full one with a masked tail of K, too
    values: dict[str, Any] = {"EVEN_K": not full, "RESUME": full, **config}
    if not full:
        values.update(dict.fromkeys(_PLAIN))
    values = {k: v for k, v in values.items() if k in kernel.arg_names}
    signature = {}
    for arg in kernel.arg_names:
        if arg in values:
            signature[arg] = "constexpr"
        elif arg in _INPUTS:
            signature[arg] = f"*{dtype}"
        else:
            signature[arg] = _FIXED.get(arg, "*fp32" if arg.endswith("_ptr") else "i32")
    divisible = tuple(a for a in signature if a not in values and a not in _RAGGED)
    stages = config.get("STAGES", 1)
    return Variant(name, kernel, signature, values, config["num_warps"], stages, divisible, budget)


def variants() -> Iterator[Variant]:
    """bfloat16 and float16 for every entry, float32 for its own; options where they have one."""
    for file, kernel, config in shipped("contrastive_loss"):
        of = kernel.split("_")[0]
        label = f"{kernel}_{file}_{config['max_rows'] or 'more'}"
        if of == "merge":
            launches = [("fp32", False), ("fp32", True)]
        elif kernel.endswith("_float32"):
            launches = [("fp32", True)]
        elif kernel.endswith("_selective"):
            launches = [("bf16", True), ("fp16", True)]
        else:
            launches = [("bf16", False), ("fp16", False)]
        for dtype, full in launches:
            yield _variant(f"{label}_{dtype}{'_full' if full else ''}", of, dtype, config, full)
