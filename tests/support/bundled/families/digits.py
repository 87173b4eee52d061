"""Two-digit numbers written by hand: real 8×8 digits from scikit-learn's bundled data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from .base import Family, Spec
from .drawing import tint

DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All bundled digits: uint8 ink ``[1797, 8, 8]`` (0–255) and labels ``[1797]``.

    Raises:
        ImportError: scikit-learn is not installed (``pip install scikit-learn``).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "training on handwritten digits needs scikit-learn: pip install scikit-learn"
        ) from error
    data = load_digits()
    ink = np.clip(data.images * (255.0 / 16.0), 0, 255).astype(np.uint8)
    return ink, data.target.astype(np.int64)


@lru_cache(maxsize=2)
def digit_indices(held_out: bool) -> tuple[tuple[int, ...], ...]:
    """Indices into ``digit_images`` by class. The last fifth of the data is held out.

    The bundled data is in the order of its writers, so most held-out digits are in hands that
    training never sees.
    """
    _, labels = digit_images()
    first_held_out = len(labels) * 4 // 5
    chosen = range(first_held_out, len(labels)) if held_out else range(first_held_out)
    return tuple(tuple(i for i in chosen if labels[i] == digit) for digit in range(10))


def draw_digit(digit: int, side: int, rng: Random, held_out: bool) -> Image.Image:
    """One handwritten ``digit`` as an ``L`` picture (ink 255, paper 0) of ``side`` pixels."""
    ink, _ = digit_images()
    index = rng.choice(digit_indices(held_out)[digit])
    return Image.fromarray(ink[index]).resize((side, side), Image.Resampling.BICUBIC)


class Digits(Family):
    """Spec ``(tens, units)``; the picture has the two digits side by side."""

    name = "digits"
    slots = (10, 10)
    size = (84, 56)

    def specs(self) -> Sequence[Spec]:
        return [(tens, units) for tens in range(10) for units in range(10)]

    def caption(self, spec: Spec, rng: Random) -> str:
        return f"the number {DIGIT_NAMES[spec[0]]} {DIGIT_NAMES[spec[1]]}"

    def attributes(self, spec: Spec) -> tuple[int, ...]:
        return spec

    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        image = Image.new("RGB", self.size, tint(rng, (238, 234, 226), 14))
        pen = tint(rng, (40, 40, 70), 30)
        for column, digit in enumerate(spec):
            side = rng.randint(38, 46)
            mask = draw_digit(digit, side, rng, held_out)
            left = column * 42 + (42 - side) // 2 + rng.randint(-2, 2)
            top = (56 - side) // 2 + rng.randint(-4, 4)
            image.paste(pen, (left, top), mask)
        return [image]
