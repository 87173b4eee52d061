"""The rollout of 8 latents and the suffix, prefill done: against its floor and its rivals."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cost import Decoder
from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.prefilled import Prefilled, plan_of, prefill, prompts
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Timing, measure
from benchmarks.rivals.official_loop import OfficialRollout
from benchmarks.rivals.static_cache import StaticCacheRollout
from benchmarks.shaped import shaped_model
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.rollout.latent import LatentPlan


def weight_bytes(model: PlumeForEmbedding, steps: int) -> int:
    """Decoder weights once per pass; K latents and the suffix cost K passes."""
    return max(steps, 1) * Decoder(model.config).products * model.dtype.itemsize


def cache_bytes(model: PlumeForEmbedding, rows: int, tokens: int, steps: int) -> int:
    """Keys and values that the passes read: those of the prompt and of the steps before."""
    c = model.config
    per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
    return rows * per_token * sum(tokens + k for k in range(max(steps, 1)))


def load(sizes: Sizes) -> PlumeForEmbedding:
    """The model of a session."""
    return shaped_model(sizes.shape, sizes.dtype, sizes.layers, str(sizes.device))


@torch.no_grad()
def short(sizes: Sizes, record: Recorder) -> None:
    """One row: bound by reading the weights."""
    rows, tokens = sizes.short
    model = load(sizes)
    plan = plan_of(model)
    batch = prompts(model, rows, tokens)
    name = f"rollout, {rows} row, {tokens}-token prefix"
    before = prefill(model, batch, plan)
    ours = measure(before.roll, sizes.device, seconds=sizes.seconds)
    floor = weight_bytes(model, plan.steps)
    detail = {"cache_bytes": cache_bytes(model, rows, tokens, plan.steps), "steps": plan.steps}
    # Written before the rivals: a slow compilation must not cost the figure.
    record.add(f"{name}, alone", ours, bytes_read=floor, **detail)

    eager = prefill(model, batch, plan, graphs=False)
    plain = measure(eager.roll, sizes.device, seconds=sizes.seconds)
    record.add(f"{name}, without graphs", plain, bytes_read=floor)

    official = OfficialRollout(model, batch[0], plan)
    loop = measure(
        official, sizes.device, seconds=sizes.seconds, rounds=(3, 20), before=official.prepare
    )
    record.add(f"{name}, official loop", loop, bytes_read=floor)

    ratio = {"without graphs": plain.median, "the official loop": loop.median}
    before = prefill(model, batch, plan)
    try:
        rival, ours = _rival(model, before, plan, tokens, sizes)
        record.add(f"{name}, compiled static cache", rival, bytes_read=floor)
        ratio["the compiled static-cache rollout"] = rival.median
    except Exception as error:
        record.missed(f"{name}, compiled static cache", error)
    record.add(name, ours, bytes_read=floor, ratio_to=ratio, **detail)


@torch.no_grad()
def long(sizes: Sizes, record: Recorder) -> None:
    """Many rows with long prefixes: bound by reading weights and cache."""
    rows, tokens = sizes.long
    model = load(sizes)
    plan = plan_of(model)
    batch = prompts(model, rows, tokens)
    name = f"rollout, {rows} rows, {tokens}-token prefixes"
    before = prefill(model, batch, plan)
    ours = measure(before.roll, sizes.device, seconds=sizes.seconds)
    floor = weight_bytes(model, plan.steps) + cache_bytes(model, rows, tokens, plan.steps)
    eager = prefill(model, batch, plan, graphs=False)
    plain = measure(eager.roll, sizes.device, seconds=sizes.seconds)
    ratio = {"without graphs": plain.median}
    record.add(name, ours, samples=rows, bytes_read=floor, ratio_to=ratio)


@torch.no_grad()
def long_rival(sizes: Sizes, record: Recorder) -> None:
    """The same against the compiled rival, whose rows all have one length, as here."""
    rows, tokens = sizes.long
    model = load(sizes)
    plan = plan_of(model)
    name = f"rollout, {rows} rows, {tokens}-token prefixes"
    before = prefill(model, prompts(model, rows, tokens), plan)
    floor = weight_bytes(model, plan.steps) + cache_bytes(model, rows, tokens, plan.steps)
    rival, ours = _rival(model, before, plan, tokens, sizes)
    record.add(f"{name}, compiled static cache", rival, samples=rows, bytes_read=floor)
    ratio = {"the compiled static-cache rollout": rival.median}
    record.add(f"{name}, again", ours, samples=rows, bytes_read=floor, ratio_to=ratio)


def _rival(
    model: PlumeForEmbedding, before: Prefilled, plan: LatentPlan, tokens: int, sizes: Sizes
) -> tuple[Timing, Timing]:
    """The compiled rival and, right after it, the engine again, so that both saw one device."""
    roll = static_rollout(model, before, plan, tokens)
    theirs = measure(roll, sizes.device, seconds=sizes.seconds, warm_up=5)
    return theirs, measure(before.roll, sizes.device, seconds=sizes.seconds)


def static_rollout(
    model: PlumeForEmbedding, before: Prefilled, plan: LatentPlan, tokens: int
) -> Callable[[], torch.Tensor]:
    """The static-cache rival after the prefill of rows of ``tokens`` tokens each.

    Raises:
        RuntimeError: it does not find the states that the engine finds.
    """
    rival = StaticCacheRollout.of(model, plan, before.states.shape[0], tokens)
    rival.load(before.cache[:, :, :, :, :tokens])

    def roll() -> torch.Tensor:
        return rival(before.states, before.states, tokens)

    difference = (roll().float() - before.roll().float()).norm() / before.roll().float().norm()
    if not float(difference) < 0.05:
        raise RuntimeError(f"the rival computes something else: relative difference {difference}")
    return roll
