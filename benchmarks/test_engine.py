"""The fast engine against the official loop, Qwen2-VL-2B shapes, random bfloat16 weights.

    pytest benchmarks/test_engine.py --benchmark-only --benchmark-json=out.json
    python -m benchmarks.report out.json

Both engines run in one process on the same weights. The official loop takes one sample at a
time, so its time per sample is measured on two and compared with the batch of the fast engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.machine import describe, peak_memory, reset_peak_memory
from benchmarks.shaped import image_items, text_items, with_engine
from ume_models.encode import encode_detailed

CASES: dict[str, dict[str, Any]] = {
    "text, batch 16": {"make": text_items, "fast": 16, "reference": 2},
    "image of 256 tokens, batch 4": {"make": image_items, "fast": 4, "reference": 1},
    "one text item": {"make": text_items, "fast": 1, "reference": 1},
    "one image of 256 tokens": {"make": image_items, "fast": 1, "reference": 1},
}


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_engine(benchmark: Any, model_2b: Any, case: str, engine: str) -> None:
    setup = CASES[case]
    model = with_engine(model_2b, engine)
    # other seeds for the warm-up, so that nothing but the constant header is computed before
    items = setup["make"](setup[engine], seed=1)
    encode_detailed(model, setup["make"](1, seed=2))
    benchmark.group = case
    reset_peak_memory()
    output = benchmark.pedantic(
        encode_detailed, (model, items), rounds=3 if engine == "fast" else 2, iterations=1
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    benchmark.extra_info.update(
        describe(),
        engine=engine,
        samples=len(items),
        prompt_tokens=output.stats.tokens / output.stats.unique,
        model_seconds=output.stats.model_seconds,
        weight_bytes=weights,
        arena_bytes=model.rollout.arena.nbytes if engine == "fast" else 0,
        peak_bytes=peak_memory(),
    )
