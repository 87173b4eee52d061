"""A fresh process to its first embedding, with the time of every part: one JSON line.

    python -m benchmarks.startup fast
    python -m benchmarks.startup reference
    python -m benchmarks.startup transformers

A second argument is the time (``time.time()``) at which the process was asked for, from which
``whole_seconds`` count; without it, from the first line here. ``transformers`` is what else a
process can do with the same weights: its own classes, one forward of one prompt, no rollout.
"""

from __future__ import annotations

import json
import sys
import time

BEGAN = time.perf_counter()
ASKED = float(sys.argv[2]) if len(sys.argv) > 2 else time.time()
TEXT = "a red circle left of a blue square"


def package(engine: str) -> dict[str, float]:
    """``ume_models.load`` and one ``encode``; reading the weights is timed apart."""
    import torch

    from ume_models.embedders import loading

    imported = time.perf_counter()
    weights = 0.0
    read = loading._read_weights

    def timed(*arguments: object) -> object:
        nonlocal weights
        start = time.perf_counter()
        try:
            return read(*arguments)  # type: ignore[arg-type]
        finally:
            weights += time.perf_counter() - start

    loading._read_weights = timed  # type: ignore[assignment]
    model = loading.load(engine=engine)  # type: ignore[arg-type]
    loaded = time.perf_counter()
    assert torch.isfinite(model.encode([{"text": TEXT}])).all()
    return {
        "import_seconds": imported - BEGAN,
        "load_seconds": loaded - imported - weights,
        "weight_seconds": weights,
        "first_seconds": time.perf_counter() - loaded,
    }


def auto_classes() -> dict[str, float]:
    """transformers alone: tokenizer, model, one forward; weights cannot be told apart."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from ume_models.assets import tiny_checkpoint

    imported = time.perf_counter()
    path = tiny_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Qwen2VLForConditionalGeneration.from_pretrained(path)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"), output_hidden_states=True)
    return {
        "import_seconds": imported - BEGAN,
        "load_seconds": loaded - imported,
        "weight_seconds": 0.0,
        "first_seconds": time.perf_counter() - loaded,
    }


def main() -> None:
    """Run and print."""
    if sys.argv[1:2] not in (["fast"], ["reference"], ["transformers"]):
        raise SystemExit(__doc__)
    kind = sys.argv[1]
    parts = auto_classes() if kind == "transformers" else package(kind)
    print(json.dumps({**parts, "whole_seconds": time.time() - ASKED}))


if __name__ == "__main__":
    main()
