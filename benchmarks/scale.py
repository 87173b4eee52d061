"""How large the benchmarks are: ``pytest benchmarks --size tiny|small|full``, or UME_BENCH_SIZE.

``small``, the default, measures within ten minutes on two CPU cores, on a model of 6 layers of
width 768. ``full`` measures Qwen2-VL-2B shapes, for longer. ``tiny`` shows that the benchmarks run
and measures nothing: ``ume bench report`` refuses its results.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

VARIABLE = "UME_BENCH_SIZE"
NAMES = ("tiny", "small", "full")


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Attributes:
        name: tiny, small or full.
        shape: key of ``benchmarks.shaped.SHAPES``, of the whole model.
        dtype: of that model.
        layer: key of ``benchmarks.gpu.layers.SIZES``, for single operations.
        rounds: rounds of a benchmark that is not too slow for them.
        least: seconds that a round is filled up to with calls.
        batches: rows of the rollout.
        prefix: tokens that are cached before the rollout.
        classes: per input class, items of a batch.
        tokens: visual tokens of an image, of a video's pair of frames, and of a page; squares.
        official: samples of the official path, which takes one at a time.
        images: pictures to preprocess, and the size range of their sides.
        ranking: queries, candidates, and queries that the official evaluator ranks in blocks.
        search: queries and candidates of the search, and pairs of the contrastive loss.
        width: columns of embeddings.
        pairs: pairs of a training step.
        scripts: shapes of the script comparison.
    """

    name: str
    shape: str
    dtype: torch.dtype
    layer: str
    rounds: int
    least: float
    batches: tuple[int, ...]
    prefix: int
    classes: dict[str, int]
    tokens: dict[str, int]
    official: int
    images: int
    sides: tuple[int, int]
    ranking: tuple[int, int, int]
    search: tuple[int, int, int]
    width: int
    pairs: int
    scripts: tuple[str, ...]

    @property
    def tiny(self) -> bool:
        """Nothing is measured."""
        return self.name == "tiny"

    @property
    def device(self) -> torch.device:
        """The first CUDA device where there is one, else the CPU."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


STEPS = (0, 2, 4, 8)
"""Latent steps K of the rollout."""

_SCALES = {
    "tiny": Scale(
        "tiny", "tiny", torch.float32, "tiny", 1, 0.0, (1, 3), 12,
        {"text": 3, "image": 2, "video": 1, "page": 1}, {"image": 4, "video": 4, "page": 9}, 1,
        6, (64, 120), (20, 300, 10), (8, 3000, 200), 48, 4, ("tiny",),
    ),
    "small": Scale(
        "small", "small", torch.bfloat16, "qwen2-vl-2b", 5, 0.02, (1, 4, 16, 64), 100,
        {"text": 32, "image": 8, "video": 8, "page": 4}, {"image": 256, "video": 64, "page": 1024},
        4, 1000, (256, 1024), (10_000, 50_000, 512), (256, 100_000, 4096), 1536, 16, ("small",),
    ),
    "full": Scale(
        "full", "qwen2-vl-2b", torch.bfloat16, "qwen2-vl-2b", 5, 0.1, (1, 4, 16, 64), 100,
        {"text": 16, "image": 4, "video": 4, "page": 2}, {"image": 256, "video": 64, "page": 1024},
        2, 1000, (256, 1024), (10_000, 50_000, 1024), (256, 100_000, 8192), 1536, 32,
        ("small", "qwen2-vl-2b"),
    ),
}  # fmt: skip


def scale() -> Scale:
    """The scale of this run.

    Raises:
        ValueError: the variable names none.
    """
    name = os.environ.get(VARIABLE, "small")
    if name not in _SCALES:
        raise ValueError(f"{VARIABLE}={name!r}; there are {', '.join(NAMES)}")
    return _SCALES[name]
