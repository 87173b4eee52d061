"""The adapter at 1 to 64 rows: against its bandwidth limit and against the official module."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import in_one_graph, measure
from benchmarks.rivals.official_adapter import OfficialStyleAdapter
from benchmarks.shaped import SHAPES
from ume_kernels import MoETransition, moe_transition
from ume_kernels.moe_transition.reference import route

STEP = 3


def least_bytes(module: MoETransition, z: torch.Tensor, context: torch.Tensor) -> tuple[int, int]:
    """Bytes a call must move — experts that some row chose, once each — and how many those are."""
    ids = torch.full((z.shape[0],), STEP, device=z.device)
    routing = route(z, context, ids, module.weights(), module.top_k)
    chosen = int(routing.experts.unique().numel())
    size = z.element_size()
    expert = sum(p.numel() for p in module.experts[0].parameters()) * size
    always = (module.router.weight.numel() + 3 * module.hidden_size) * size
    shared = 0 if module.shared_expert is None else expert
    # z, context and the result
    return chosen * expert + shared + always + 3 * z.numel() * size, chosen


@torch.no_grad()
def run(sizes: Sizes, record: Recorder) -> None:
    """Every row count; weights rotate among ``sizes.sets`` modules so that DRAM is read."""
    width = SHAPES[sizes.shape]["hidden_size"]
    modules = [
        MoETransition(width).to(sizes.device, sizes.dtype).requires_grad_(False).pack_experts()
        for _ in range(sizes.sets)
    ]
    for rows in sizes.adapter_rows:
        try:
            _measure(modules, rows, sizes, record)
        except Exception as error:
            record.missed(f"adapter, {rows} rows", error)
            if sizes.device.type == "cuda" and "CUDA error" in str(error):
                raise  # the context is gone


def _measure(modules: list[MoETransition], rows: int, sizes: Sizes, record: Recorder) -> None:
    device, width = sizes.device, modules[0].hidden_size
    z, context = torch.randn(2, rows, width, device=device).to(sizes.dtype).unbind(0)
    counted = [least_bytes(module, z, context) for module in modules]

    def ours(module: MoETransition) -> Callable[[], object]:
        return lambda: module(z, STEP, context)

    def plain(module: MoETransition) -> Callable[[], object]:
        weights, k = module.weights(), module.top_k
        return lambda: moe_transition(z, context, STEP, weights, k, backend="torch")

    # once around and once more, so that a graph is long enough to time
    calls = [ours(module) for module in modules * 2]
    timing = measure(in_one_graph(calls, device), device, seconds=sizes.seconds).per(len(calls))
    officials = [OfficialStyleAdapter(module) for module in modules]
    official = measure(
        lambda: [module(z, STEP, context) for module in officials],
        device,
        seconds=sizes.seconds / 2,
        rounds=(3, 50),
    ).per(len(officials))
    replay = in_one_graph([plain(module) for module in modules], device)
    torch_only = measure(replay, device, seconds=sizes.seconds / 2).per(len(modules))
    record.add(
        f"adapter, {rows} rows",
        timing,
        samples=rows,
        bytes_read=sum(size for size, _ in counted) / len(counted),
        ratio_to={
            "the official module": official.median,
            "PyTorch in a graph": torch_only.median,
        },
        experts_read=[experts for _, experts in counted],
        official_seconds=official.median,
        torch_seconds=torch_only.median,
    )
