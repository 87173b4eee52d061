"""Every kernel with every shipped configuration, at the sizes of PLUME's adapter (Qwen2-VL-2B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ume_kernels.aot import Budget, Variant
from ume_kernels.moe_transition import triton_backward as bwd
from ume_kernels.moe_transition import triton_kernels as fwd
from ume_kernels.tuning import Config, shipped

HIDDEN, EXPERTS, TOP_K = 1536, 4, 2

_FIXED = {
    "eps": "fp32",
    "step_ptr": "*i64",
    "excluded_ptr": "*u8",
    "probs_ptr": "*fp32",
    "mean_probs_ptr": "*fp32",
    "gates_ptr": "*fp32",
    "aux_ptr": "*fp32",
    "grad_aux_ptr": "*fp32",
    "grad_norm_ptr": "*fp32",
    "grad_gates_ptr": "*fp32",
    "grad_logits_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "counter_ptr": "*i32",
}
_RAGGED = ("eps", "B", "tiles", "step_value", "max_steps", "counters")

_KERNELS: Mapping[str, tuple[Any, Budget]] = {
    "fc1_selected": (fwd.fc1_selected_kernel, fwd.FC1_SELECTED_BUDGET),
    "fc1_all": (fwd.fc1_all_kernel, fwd.FC1_ALL_BUDGET),
    "fc2": (fwd.fc2_kernel, fwd.FC2_BUDGET),
    "grad_hidden": (bwd.grad_hidden_kernel, bwd.GRAD_HIDDEN_BUDGET),
    "grad_norm": (bwd.grad_norm_kernel, bwd.GRAD_NORM_BUDGET),
    "grad_input": (bwd.grad_input_kernel, bwd.GRAD_INPUT_BUDGET),
}


def _variant(name: str, of: str, dtype: str, config: Config, saves: bool) -> Variant:
    kernel, budget = _KERNELS[of]
    rows = config.get("ROWS", 1)
    route_rows = rows if of == "fc1_selected" else fwd.ROUTE_ROWS
    values: dict[str, Any] = {
        "D": HIDDEN,
        "E": EXPERTS,
        "TOP_K": TOP_K,
        "STEP_PER_ROW": True,
        "PER_SAMPLE": False,
        "HAS_SHARED": True,
        "ROUTE": fwd.ROUTE_ROWS,
        "BLOCK_D": 1 << (HIDDEN - 1).bit_length(),
        **fwd.blocks(HIDDEN, EXPERTS, True, route_rows, rows),
        **config,
    }
    if not saves:
        values["pre_ptr"] = None
    if values.get("SPLITS") == 1:
        values["partial_ptr"] = None
    values = {k: v for k, v in values.items() if k in kernel.arg_names}
    signature = {}
    for arg in kernel.arg_names:
        if arg in values:
            signature[arg] = "constexpr"
        else:
            signature[arg] = _FIXED.get(arg, f"*{dtype}" if arg.endswith("_ptr") else "i32")
    divisible = tuple(a for a in signature if a not in values and a not in _RAGGED)
    stages = config.get("STAGES", 1)
    return Variant(
        name, kernel, signature, values, config["num_warps"], stages, divisible, budget
    )


def variants() -> Iterator[Variant]:
    """bfloat16 for every entry, float16 for the first, float32 for every one of its own tables."""
    seen: set[str] = set()
    for file, kernel, config in shipped("moe_transition"):
        of = kernel.removesuffix("_float32")
        label = f"{kernel}_{file}_{config['max_rows'] or 'more'}"
        dtypes = ["bf16"] if of in seen else ["bf16", "fp16"]
        if of != kernel:
            dtypes = ["fp32"]
        seen.add(of)
        for dtype in dtypes:
            # inference, and for the first entry the launch that saves for the backward
            for saves in (False, True) if dtype == "fp16" and of.startswith("fc1") else (False,):
                name = f"{label}_{dtype}{'_saving' if saves else ''}"
                if of.startswith("grad"):
                    saves = True
                yield _variant(name, of, dtype, config, saves)
    for dtype in ("bf16", "fp16", "fp32"):
        yield _variant(f"grad_input_{dtype}", "grad_input", dtype, {"num_warps": 4}, True)
