"""The adapter and the rollout on a GPU, for pytest-benchmark; ``benchmarks.gpu_session`` does more.

    pytest benchmarks/test_gpu.py --benchmark-only --benchmark-json=out.json

Calls that can be are replayed as one CUDA graph, so that their launches do not count.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cost import Adapter, Decoder, rollout
from benchmarks.gpu.prefilled import plan_of, prefill, prompts
from benchmarks.gpu.sizes import REAL
from benchmarks.limits import floor
from benchmarks.record import record
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


ROLES = {"ours": "ours", "graph": "ours", "official": "reference", "eager": "rival"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", "official"])
@pytest.mark.parametrize("rows", REAL.adapter_rows)
def test_adapter(benchmark: Any, rows: int, kind: str) -> None:
    modules = [
        MoETransition(1536).to(REAL.device, REAL.dtype).requires_grad_(False).pack_experts()
        for _ in range(REAL.sets)
    ]
    z, context = torch.randn(2, rows, 1536, device=REAL.device).to(REAL.dtype).unbind(0)
    made = modules if kind == "ours" else [OfficialStyleAdapter(m) for m in modules]
    record(
        benchmark, [lambda m=m: m(z, 3, context) for m in made],
        section="operation", group=f"adapter, {rows} rows, {len(modules)} sets of weights",
        engine="moe_transition" if kind == "ours" else "official module", role=ROLES[kind],
        samples=rows, rounds=20, warm_up=3, graph=kind == "ours",
        floor_seconds=floor([Adapter().work(1536, rows)]),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["graph", "eager", "official"])
@pytest.mark.parametrize("size", [REAL.short, REAL.long], ids=str)
def test_rollout(benchmark: Any, model: Any, size: tuple[int, int], kind: str) -> None:
    rows, tokens = size
    plan, batch = plan_of(model), prompts(model, rows, tokens)
    steps, suffix = plan.steps, len(plan.suffix_ids)
    parts = rollout(Decoder(model.config), Adapter(), rows, tokens, steps, suffix)
    about = {
        "section": "rollout", "group": f"rollout, {rows} rows, {tokens}-token prefixes",
        "samples": rows, "rounds": 20, "warm_up": 3, "role": ROLES[kind], "filled": False,
        "floor_seconds": floor(parts),
    }  # fmt: skip
    if kind == "official":
        if rows > 1:
            pytest.skip("the official loop takes one row at a time")
        official = OfficialRollout(model, batch[0], plan)

        def work() -> None:
            official.prepare()  # a copy of 28 small tensors; the loop takes a hundred times longer
            official()

        record(benchmark, work, engine="official loop", **about)
        return
    roll = prefill(model, batch, plan, graphs=kind == "graph").roll
    record(benchmark, roll, engine="fast engine" + ", no graph" * (kind == "eager"), **about)
