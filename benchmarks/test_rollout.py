"""The rollout after the prefill: K latent steps and the suffix, over K and over the batch.

    pytest benchmarks/test_rollout.py --benchmark-only --benchmark-json=out.json

The cache is filled with random keys and values of ``prefix`` tokens per row: its contents do not
change the time, and a prefill would take longer than what is measured. The official loop takes one
row at a time, so its time per sample is that of one row, whatever the batch it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cost import Adapter, Decoder, rollout
from benchmarks.gpu.prefilled import plan_of, prompts
from benchmarks.limits import floor
from benchmarks.record import record
from benchmarks.rivals.official_loop import OfficialRollout
from benchmarks.rivals.static_cache import StaticCacheRollout
from benchmarks.scale import STEPS, scale
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.rollout.engine import Prefilled
from ume_models.rollout.latent import Latent, LatentPlan

SIZE = scale()
ENGINES = ("fast engine", "official loop", "static buffers")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", SIZE.batches)
@pytest.mark.parametrize("steps", STEPS)
def test_rollout(
    benchmark: Any, model: PlumeForEmbedding, steps: int, rows: int, engine: str
) -> None:
    if engine == "static buffers" and SIZE.device.type == "cuda" and steps != max(STEPS):
        pytest.skip("every K compiles for a minute; the largest one is compared")
    plan = plan_of(model, steps)
    taken = 1 if engine == "official loop" else rows
    make = {"fast engine": ours, "official loop": official, "static buffers": static}[engine]
    parts = rollout(
        Decoder(model.config), Adapter(), taken, SIZE.prefix, steps, len(plan.suffix_ids)
    )
    with torch.no_grad():
        record(
            benchmark, make(model, plan, rows),
            section="rollout", group=f"rollout, K = {steps}, batch {rows}", engine=engine,
            role={"fast engine": "ours", "official loop": "reference"}.get(engine, "rival"),
            samples=taken, batch=taken, latent_steps=steps, rounds=3, floor_seconds=floor(parts),
            shape=SIZE.shape, warm_up=5 if SIZE.device.type == "cuda" else 1,
        )  # fmt: skip


def states(model: PlumeForEmbedding, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, model.hidden_size, generator=generator)
    return drawn.to(model.device, model.dtype)


def ours(model: PlumeForEmbedding, plan: LatentPlan, rows: int) -> Callable[[], Any]:
    """The engine's loop on its own arena; on a GPU, a replay of a graph."""
    engine, lengths = model.rollout, [SIZE.prefix] * rows
    cache = engine.arena.begin(lengths, plan.steps + len(plan.suffix_ids))
    cache[..., : SIZE.prefix, :].normal_()
    z, layers = states(model, rows), model.model.layer_weights()
    policy = Latent(plan, model.latent_moe_transition)
    prefilled = Prefilled(engine, layers, lengths, cache, (z, z))
    return lambda: policy.follow(prefilled, False)[0]


def static(model: PlumeForEmbedding, plan: LatentPlan, rows: int) -> Callable[[], Any]:
    """Key/value buffers of fixed size as torch.compile wants them; compiled on a GPU."""
    rival = StaticCacheRollout.of(model, plan, rows, SIZE.prefix)
    rival.cache[..., : SIZE.prefix, :].normal_()
    z = states(model, rows)
    return lambda: rival(z, z, SIZE.prefix)


def official(model: PlumeForEmbedding, plan: LatentPlan, rows: int) -> Callable[[], Any]:
    """One row, one call of transformers per step."""
    [sequence] = prompts(model, 1, SIZE.prefix)
    loop = OfficialRollout(model, sequence, plan)

    def work() -> torch.Tensor:
        loop.prepare()  # a copy of some small tensors, hundreds of times quicker than the loop
        return loop()

    return work
