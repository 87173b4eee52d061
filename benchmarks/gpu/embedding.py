"""Whole embeddings at batch 64, items to vectors: text, and images of 256 visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import wall
from benchmarks.shaped import image_items, shaped_model, text_items, with_engine
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.encode import encode_detailed
from ume_models.processing import PreparedItem

ROUNDS = 5


def run(sizes: Sizes, record: Recorder) -> None:
    """Text first: it is the shorter of the two."""
    model = shaped_model(sizes.shape, sizes.dtype, sizes.layers, str(sizes.device))

    def images(count: int, seed: int = 0) -> list[dict[str, Any]]:
        return image_items(count, sizes.visual_tokens, seed)

    for kind, make in (
        ("text", text_items),
        (f"images of {sizes.visual_tokens} visual tokens", images),
    ):
        name = f"embedding, {kind}, batch {sizes.batch}"
        try:
            _measure(model, name, make, sizes, record)
        except Exception as error:
            record.missed(name, error)
            if sizes.device.type == "cuda" and "CUDA error" in str(error):
                raise


def _measure(
    model: PlumeForEmbedding,
    name: str,
    make: Callable[..., list[dict[str, Any]]],
    sizes: Sizes,
    record: Recorder,
) -> None:
    with_engine(model, "fast")
    seed = iter(range(1000))
    # New items in every round, all made beforehand: nothing but the constant header is known.
    rounds = [make(sizes.batch, seed=next(seed)) for _ in range(ROUNDS + 2)]
    fed = iter(rounds)
    stats: list[Any] = []

    def fast() -> None:
        stats.append(encode_detailed(model, next(fed), workers=8, progress=False).stats)

    ours = wall(fast, sizes.device, ROUNDS, warm_up=2)
    fed = iter(rounds)

    def single_pass() -> None:
        encode_detailed(model, next(fed), workers=8, progress=False, latent_steps=0)

    without = wall(single_pass, sizes.device, ROUNDS, warm_up=2)

    prepared = _prepare(model, rounds[0])
    only = wall(lambda: model.embed_prepared(prepared), sizes.device, ROUNDS)
    none = model.options.replaced({"latent_steps": 0})
    only_without = wall(lambda: model.embed_prepared(prepared, none), sizes.device, ROUNDS)

    with_engine(model, "reference")
    one = make(1, seed=next(seed))
    encode_detailed(model, one, progress=False)
    few = make(sizes.official, seed=next(seed))
    official = wall(
        lambda: encode_detailed(model, few, workers=8, progress=False), sizes.device, 2, warm_up=0
    ).per(len(few))
    with_engine(model, "fast")

    samples = len(rounds[0])
    detail = {
        "samples_per_second": samples / ours.median,
        "official_samples_per_second": 1 / official.median,
        "prompt_tokens": stats[-1].tokens / stats[-1].unique,
        "over_no_latent_steps": ours.median / without.median,
        "model_only_over_no_latent_steps": only.median / only_without.median,
        "model_only_samples_per_second": samples / only.median,
        "batches": stats[-1].batches,
    }
    record.add(
        name,
        ours,
        samples=samples,
        ratio_to={
            "the official path": official.median * samples,
            "no latent steps": without.median,
        },
        **detail,
    )
    record.add(f"{name}, model only", only, samples=samples)
    record.add(f"{name}, no latent steps", without, samples=samples)
    record.add(f"{name}, official path, one item", official)


def _prepare(model: PlumeForEmbedding, items: list[dict[str, Any]]) -> list[PreparedItem]:
    processor = model.processor
    assert processor is not None
    return [processor.load(plan) for plan in processor.plan(items, "raise")]
