"""What every family of training pictures has: combinations, captions, a renderer, attributes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random

from PIL import Image

Spec = tuple[int, ...]

HELD_OUT_PERCENT = 15


class Family(ABC):
    """One kind of picture (scenes, digits, charts, …), described by small integer tuples.

    A *spec* says what a picture shows; the renderer adds everything that should not matter
    (positions, sizes, tints, handwriting). Two pictures of one spec are each other's positives.

    Attributes:
        name: identifies the family; specs of different families never collide.
        slots: number of values of each attribute a spec is described by (training targets).
        size: ``(width, height)`` in pixels, multiples of 28 so that no resizing ever happens.
        frames: 1 for pictures, 4 for clips.
    """

    name: str
    slots: tuple[int, ...]
    size: tuple[int, int]
    frames: int = 1

    @abstractmethod
    def specs(self) -> Sequence[Spec]:
        """All combinations, in a fixed order."""

    @abstractmethod
    def caption(self, spec: Spec, rng: Random) -> str:
        """A text that says what ``spec`` shows; several phrasings where the family has them."""

    @abstractmethod
    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        """``frames`` RGB pictures of ``spec``. ``held_out`` selects held-out source material."""

    @abstractmethod
    def attributes(self, spec: Spec) -> tuple[int, ...]:
        """One class index per entry of ``slots``."""

    def key(self, spec: Spec) -> str:
        """Identity of what is shown; equal keys are never used as negatives of each other."""
        return self.name + ":" + "-".join(map(str, spec))

    def is_held_out(self, spec: Spec) -> bool:
        """Whether training never sees ``spec``. A hash, so independent of seed and order."""
        digest = hashlib.sha256(self.key(spec).encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT

    def split(self, held_out: bool) -> list[Spec]:
        """The specs of one side of the split."""
        return [spec for spec in self.specs() if self.is_held_out(spec) == held_out]
