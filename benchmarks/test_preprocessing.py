"""Images to inputs of the model: decoded, resized twice, cut into patches, tokenised.

    pytest benchmarks/test_preprocessing.py --benchmark-only --benchmark-json=out.json

This package with two worker threads, the official path with the one that also runs the model, and
transformers' processor in two threads without the official detour. All three give the same ids
and the same pixels, bit by bit. ``raw_bytes`` is the size of the files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.record import record
from benchmarks.rivals.official_preprocessing import TransformersPreprocessing
from benchmarks.scale import scale
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.processing import prefetch

SIZE = scale()
WORKERS = 2
BAR = 1.7
ENGINES = {
    f"Processor, {WORKERS} workers": "ours",
    "official path": "reference",
    f"transformers, {WORKERS} threads": "rival",
}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Files of many sizes with the detail of photographs; every tenth is a PNG."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for number in range(SIZE.images):
        width, height = (int(side) for side in rng.integers(*SIZE.sides, 2))
        grid = rng.integers(0, 255, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        picture = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        kind = "png" if number % 10 == 9 else "jpg"
        path = folder / f"{number}.{kind}"
        picture.save(path, compress_level=1) if kind == "png" else picture.save(path, quality=90)
        made.append({"text": "a photo of people on the street", "image": str(path)})
    return made


@pytest.fixture(autouse=True)
def _one_thread_each() -> Any:
    """No library of the workers starts threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Run = Callable[[list[dict[str, Any]]], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def runs(model: PlumeForEmbedding) -> dict[str, Run]:
    processor = model.processor

    def ours(items: list[dict[str, Any]]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for item in prefetch(processor.load, processor.plan(items), WORKERS, 8):
            assert item.pixel_values is not None
            yield item.input_ids, item.pixel_values

    official = TransformersPreprocessing(processor, encode_anew=True)
    plain = TransformersPreprocessing(processor, encode_anew=False)
    every: tuple[Run, ...] = (
        ours,
        lambda items: official.run(items, 0),
        lambda items: plain.run(items, WORKERS),
    )
    return dict(zip(ENGINES, every, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_preprocessing(
    benchmark: Any, model: PlumeForEmbedding, items: list[dict[str, Any]], engine: str
) -> None:
    every = runs(model)
    for got, want in zip(every[engine](items[:3]), every["official path"](items[:3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    record(
        benchmark, lambda: deque(every[engine](items), maxlen=0), section="preprocessing",
        group=f"{len(items):,} images of {SIZE.sides[0]} to {SIZE.sides[1]} pixels a side",
        engine=engine, role=ENGINES[engine],  # type: ignore[arg-type]
        samples=len(items), rounds=1, warm_up=0, filled=False, on_cpu=True,
        bar=BAR if ENGINES[engine] == "ours" else None,
        raw_bytes=sum(Path(item["image"]).stat().st_size for item in items),
    )  # fmt: skip
