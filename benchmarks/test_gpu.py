"""The adapter and the rollout on a GPU, for pytest-benchmark; ``benchmarks.gpu_session`` does more.

    pytest benchmarks/test_gpu.py --benchmark-only --benchmark-json=out.json

Each round is one replay of a CUDA graph and the wait for it, so that launches do not count.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.prefilled import plan_of, prefill, prompts
from benchmarks.gpu.sizes import REAL
from benchmarks.gpu.timing import in_one_graph, synchronize
from benchmarks.machine import describe, gpu_state
from benchmarks.rivals.official_adapter import OfficialStyleAdapter
from benchmarks.rivals.official_loop import OfficialRollout
from benchmarks.shaped import shaped_model
from ume_kernels import MoETransition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return shaped_model(REAL.shape, REAL.dtype, REAL.layers, str(REAL.device))


def run(benchmark: Any, work: Any, **info: Any) -> None:
    def complete() -> None:
        work()
        synchronize(REAL.device)

    benchmark.pedantic(complete, rounds=20, iterations=1, warmup_rounds=3)
    benchmark.extra_info.update(describe(), nvml=gpu_state(), **info)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", "official"])
@pytest.mark.parametrize("rows", REAL.adapter_rows)
def test_adapter(benchmark: Any, rows: int, kind: str) -> None:
    modules = [
        MoETransition(1536).to(REAL.device, REAL.dtype).requires_grad_(False).pack_experts()
        for _ in range(REAL.sets)
    ]
    z, context = torch.randn(2, rows, 1536, device=REAL.device).to(REAL.dtype).unbind(0)
    benchmark.group = f"adapter, {rows} rows, {len(modules)} calls"
    if kind == "ours":
        calls = [lambda m=m: m(z, 3, context) for m in modules]
        run(benchmark, in_one_graph(calls, REAL.device), rows=rows, calls=len(modules))
        return
    officials = [OfficialStyleAdapter(m) for m in modules]
    run(benchmark, lambda: [m(z, 3, context) for m in officials], rows=rows, calls=len(modules))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["graph", "eager", "official"])
@pytest.mark.parametrize("size", [REAL.short, REAL.long], ids=str)
def test_rollout(benchmark: Any, model: Any, size: tuple[int, int], kind: str) -> None:
    rows, tokens = size
    plan, batch = plan_of(model), prompts(model, rows, tokens)
    benchmark.group = f"rollout, {rows} rows, {tokens}-token prefixes"
    if kind == "official":
        if rows > 1:
            pytest.skip("the official loop takes one row at a time")
        official = OfficialRollout(model, batch[0], plan)

        def work() -> None:
            official.prepare()  # a copy of 28 small tensors; the loop takes a hundred times longer
            official()

        run(benchmark, work, rows=rows)
        return
    run(benchmark, prefill(model, batch, plan, graphs=kind == "graph").roll, rows=rows)
