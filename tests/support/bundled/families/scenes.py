"""Scenes: two coloured shapes in a relation, or a few equal shapes to count."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from .base import Family, Spec
from .drawing import COLOURS, OVERSAMPLE, SHAPES, canvas, draw_shape, reduce, tint, with_article

_COLOURS = tuple(COLOURS)
_COUNTS = ("two", "three", "four", "five")
_RELATIONS = (("left of", "right of"), ("above", "below"))


class Scenes(Family):
    """Spec ``(0, colour, shape, relation, colour, shape)`` or ``(1, colour, shape, count)``."""

    name = "scene"
    # layout (left/right, above/below, two … five), then colour and shape of both objects; the
    # last value of the second object's slots means "there is no second kind of object".
    slots = (6, len(COLOURS), len(SHAPES), len(COLOURS) + 1, len(SHAPES) + 1)
    size = (84, 84)

    def specs(self) -> Sequence[Spec]:
        objects = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
        pairs: list[Spec] = [
            (0, *first, relation, *second)
            for relation in range(2)
            for first in objects
            for second in objects
            if first != second
        ]
        counts: list[Spec] = [(1, *obj, n) for obj in objects for n in range(len(_COUNTS))]
        return pairs + counts

    def caption(self, spec: Spec, rng: Random) -> str:
        if spec[0] == 1:
            return f"{_COUNTS[spec[3]]} {_COLOURS[spec[1]]} {SHAPES[spec[2]]}s".replace(
                "crosss", "crosses"
            )
        first = f"{with_article(_COLOURS[spec[1]])} {SHAPES[spec[2]]}"
        second = f"{with_article(_COLOURS[spec[4]])} {SHAPES[spec[5]]}"
        forward, backward = _RELATIONS[spec[3]]
        # "A left of B" and "B right of A" are the same scene.
        if rng.random() < 0.5:
            return f"{first} {forward} {second}"
        return f"{second} {backward} {first}"

    def attributes(self, spec: Spec) -> tuple[int, ...]:
        if spec[0] == 1:
            return (2 + spec[3], spec[1], spec[2], len(COLOURS), len(SHAPES))
        return (spec[3], spec[1], spec[2], spec[4], spec[5])

    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        image = canvas(self.size, tint(rng, (242, 242, 240), 12))
        draw = ImageDraw.Draw(image)
        for (x, y), radius, colour, shape in self._objects(spec, rng):
            draw_shape(
                draw,
                SHAPES[shape],
                (x * OVERSAMPLE, y * OVERSAMPLE),
                radius * OVERSAMPLE,
                tint(rng, COLOURS[_COLOURS[colour]], 14),
            )
        return [reduce(image)]

    def _objects(
        self, spec: Spec, rng: Random
    ) -> list[tuple[tuple[float, float], float, int, int]]:
        if spec[0] == 1:
            cells = rng.sample([(c, r) for c in range(3) for r in range(3)], spec[3] + 2)
            radius = rng.uniform(9, 11)
            return [
                (
                    (14 + 28 * c + rng.uniform(-2, 2), 14 + 28 * r + rng.uniform(-2, 2)),
                    radius,
                    spec[1],
                    spec[2],
                )
                for c, r in cells
            ]
        # Along the axis of the relation the two are well apart, across it they wander.
        along = (rng.uniform(18, 24), rng.uniform(60, 66))
        middle = rng.uniform(26, 58)
        across = (middle + rng.uniform(-7, 7), middle + rng.uniform(-7, 7))
        places = list(zip(along, across, strict=True))
        if spec[3] == 1:
            places = [(y, x) for x, y in places]
        return [
            (places[0], rng.uniform(12, 16), spec[1], spec[2]),
            (places[1], rng.uniform(12, 16), spec[4], spec[5]),
        ]
