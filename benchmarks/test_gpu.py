"""The adapter and the rollout on a GPU, for pytest-benchmark; ``benchmarks.gpu_session`` does more.

    pytest benchmarks/test_gpu.py --benchmark-only --benchmark-json=out.json

Calls that can be are replayed as one CUDA graph, so that their launches do not count. The rollout
without its graph is this package's own ablation; its rival is the compiled static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cost import Adapter, Decoder, rollout
from benchmarks.gpu.prefilled import plan_of, prefill, prompts
from benchmarks.gpu.rollout import static_rollout
from benchmarks.gpu.sizes import REAL
from benchmarks.limits import floor
from benchmarks.record import Role, record
from benchmarks.rivals.official_adapter import OfficialStyleAdapter
from benchmarks.rivals.official_loop import OfficialRollout
from benchmarks.shaped import shaped_model
from ume_kernels import MoETransition
from ume_models.rollout.latent import LatentPlan
from ume_models.rollout.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return shaped_model(REAL.shape, REAL.dtype, REAL.layers, str(REAL.device))


ENGINES: dict[str, tuple[str, Role]] = {
    "graph": ("fast engine", "ours"),
    "official": ("official loop", "reference"),
    "static": ("static buffers", "rival"),
    "eager": ("fast engine, no graph", "ablation"),
}


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
        engine="moe_transition" if kind == "ours" else "official module",
        role="ours" if kind == "ours" else "reference", samples=rows, rounds=20, warm_up=3,
        graph=kind == "ours", floor_seconds=floor([Adapter().work(1536, rows)]),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("size", [REAL.short, REAL.long], ids=str)
def test_rollout(benchmark: Any, model: Any, size: tuple[int, int], kind: str) -> None:
    rows, tokens = size
    plan, batch = plan_of(model), prompts(model, rows, tokens)
    steps, suffix = plan.steps, len(plan.suffix_ids)
    parts = rollout(Decoder(model.config), Adapter(), rows, tokens, steps, suffix)
    engine, role = ENGINES[kind]
    if kind == "official" and rows > 1:
        pytest.skip("the official loop takes one row at a time")
    if kind == "official":
        work = official(model, batch[0], plan)
    else:
        before = prefill(model, batch, plan, graphs=kind == "graph")
        work = static_rollout(model, before, plan, tokens) if kind == "static" else before.roll
    record(
        benchmark, work, section="rollout", group=f"rollout, {rows} rows, {tokens}-token prefixes",
        engine=engine, role=role, samples=rows, rounds=20, warm_up=5, filled=False,
        floor_seconds=floor(parts),
    )  # fmt: skip


def official(model: Any, sequence: Sequence, plan: LatentPlan) -> Callable[[], Any]:
    loop = OfficialRollout(model, sequence, plan)

    def work() -> Any:
        loop.prepare()  # a copy of 28 small tensors; the loop takes a hundred times longer
        return loop()

    return work
