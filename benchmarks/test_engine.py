"""Whole embeddings per input class: the fast engine, the official loop, and padded batches.

    pytest benchmarks/test_engine.py --benchmark-only --benchmark-json=out.json
    ume bench report out.json

All engines run in one process on the same random weights, with the same rounds and warm-up. The
official loop takes one sample at a time, so its time per sample is measured on a few and compared
with the batch of the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.record import record
from benchmarks.rivals.batched import BatchedTransformers
from benchmarks.scale import scale
from benchmarks.shaped import image_items, page_items, text_items, video_items, with_engine
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.encode import encode_detailed

SIZE = scale()
Make = Callable[[int, int], list[dict[str, Any]]]
MAKE: dict[str, Make] = {
    "text": lambda count, seed: text_items(count, seed=seed),
    "image": lambda count, seed: image_items(count, SIZE.tokens["image"], seed),
    "video": lambda count, seed: video_items(count, SIZE.tokens["video"], seed),
    "page": lambda count, seed: page_items(count, SIZE.tokens["page"], seed),
}
WHAT = {
    "text": "text",
    "image": f"image of {SIZE.tokens['image']} tokens",
    "video": f"video of 8 frames, {4 * SIZE.tokens['video']} tokens",
    "page": f"page of {SIZE.tokens['page']} tokens",
}
CASES: dict[str, tuple[str, int]] = {
    **{f"{WHAT[kind]}, batch {count}": (kind, count) for kind, count in SIZE.classes.items()},
    "one text item": ("text", 1),
    f"one image of {SIZE.tokens['image']} tokens": ("image", 1),
}
"""Input class and items of a batch; ``benchmarks.floor`` knows some of the names."""
WARM_UP = 3 if SIZE.device.type == "cuda" else 1
"""Calls before; on a GPU, compilation and the recording of graphs take more than one."""


@pytest.mark.parametrize("engine", ["fast", "reference", "padded batches"])
@pytest.mark.parametrize("case", CASES)
def test_engine(benchmark: Any, model: PlumeForEmbedding, case: str, engine: str) -> None:
    kind, count = CASES[case]
    taken = min(count, SIZE.official) if engine == "reference" else count
    # another seed for the warm-up, so that nothing but the constant header is computed before
    items, others = MAKE[kind](taken, 1), MAKE[kind](taken, 2)
    gc.collect()
    reset_peak_memory(model.device)
    before = peak_memory(model.device)
    if engine == "padded batches":
        rival = BatchedTransformers(model, count, compiled=model.device.type == "cuda")
        record(
            benchmark, lambda: rival.encode(items), section="input class", group=case,
            engine=engine, role="rival", samples=taken, rounds=2, warm_up=WARM_UP,
            warm=lambda: rival.encode(others), filled=False, shape=SIZE.shape,
        )  # fmt: skip
        benchmark.extra_info["extra_bytes"] = peak_memory(model.device) - before
        return
    with_engine(model, engine)
    try:
        output = record(
            benchmark, lambda: encode_detailed(model, items), section="input class", group=case,
            engine=engine, role="ours" if engine == "fast" else "reference", samples=taken,
            rounds=2, warm_up=WARM_UP, warm=lambda: encode_detailed(model, others), filled=False,
            shape=SIZE.shape,
        )  # fmt: skip
    finally:
        with_engine(model, "fast")
    stats = output.stats
    benchmark.extra_info.update(
        prompt_tokens=stats.tokens / stats.unique,
        model_seconds=stats.model_seconds,
        wait_seconds=stats.wait_seconds,
        plan_seconds=stats.plan_seconds,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        arena_bytes=model.rollout.arena.nbytes if engine == "fast" else 0,
        extra_bytes=peak_memory(model.device) - before,
    )
