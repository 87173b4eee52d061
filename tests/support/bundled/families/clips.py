"""Clips of four frames: a shape that moves or changes size, or one digit turning into another."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from .base import Family, Spec
from .digits import DIGIT_NAMES, draw_digit
from .drawing import COLOURS, OVERSAMPLE, SHAPES, canvas, draw_shape, reduce, tint, with_article

_COLOURS = tuple(COLOURS)
_MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
_BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
    "pink": (250, 190, 205),
}
_BACKGROUND_NAMES = tuple(_BACKGROUNDS)


class Clips(Family):
    """Spec ``(0, colour, shape, motion, background)`` or ``(1, first digit, last digit)``."""

    name = "clip"
    # motion (the last value: a digit changes), colour, shape, background, first and last digit;
    # the last value of every other slot means "does not apply".
    slots = (7, len(COLOURS) + 1, len(SHAPES) + 1, len(_BACKGROUNDS) + 1, 11, 11)
    size = (56, 56)
    frames = 4

    def specs(self) -> Sequence[Spec]:
        moving: list[Spec] = [
            (0, colour, shape, motion, background)
            for colour in range(len(COLOURS))
            for shape in range(len(SHAPES))
            for motion in range(len(_MOTIONS))
            for background in range(len(_BACKGROUNDS))
        ]
        return moving + [(1, a, b) for a in range(10) for b in range(10) if a != b]

    def caption(self, spec: Spec, rng: Random) -> str:
        if spec[0] == 1:
            return f"the digit {DIGIT_NAMES[spec[1]]} turning into the digit {DIGIT_NAMES[spec[2]]}"
        return (
            f"{with_article(_COLOURS[spec[1]])} {SHAPES[spec[2]]} {_MOTIONS[spec[3]]} "
            f"on a {_BACKGROUND_NAMES[spec[4]]} background"
        )

    def attributes(self, spec: Spec) -> tuple[int, ...]:
        if spec[0] == 1:
            return (6, len(COLOURS), len(SHAPES), len(_BACKGROUNDS), spec[1], spec[2])
        return (spec[3], spec[1], spec[2], spec[4], 10, 10)

    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        return self._morph(spec, rng, held_out) if spec[0] == 1 else self._motion(spec, rng)

    def _morph(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        paper = Image.new("RGB", self.size, tint(rng, (238, 234, 226), 14))
        pen = Image.new("RGB", self.size, tint(rng, (40, 40, 70), 30))
        masks = []
        for digit in spec[1:]:
            side = rng.randint(44, 52)
            mask = Image.new("L", self.size, 0)
            place = tuple((56 - side) // 2 + rng.randint(-2, 2) for _ in range(2))
            mask.paste(draw_digit(digit, side, rng, held_out), (place[0], place[1]))
            masks.append(mask)
        mixed = [Image.blend(masks[0], masks[1], step / 3) for step in range(4)]
        return [Image.composite(pen, paper, mask) for mask in mixed]

    def _motion(self, spec: Spec, rng: Random) -> list[Image.Image]:
        _, colour, shape, motion, background = spec
        ground = tint(rng, _BACKGROUNDS[_BACKGROUND_NAMES[background]], 6)
        fill = tint(rng, COLOURS[_COLOURS[colour]], 14)
        radius = rng.uniform(10, 13)
        across = rng.uniform(20, 36)
        start, stop = rng.uniform(13, 18), rng.uniform(38, 43)
        frames = []
        for step in range(4):
            along = start + (stop - start) * step / 3
            place = {
                0: (56 - along, across),
                1: (along, across),
                2: (across, 56 - along),
                3: (across, along),
            }.get(motion, (across, 56 - across))
            size = radius
            if motion >= 4:
                grown = step if motion == 4 else 3 - step
                size = 5 + (radius + 4 - 5) * grown / 3
            image = canvas(self.size, ground)
            centre = (place[0] * OVERSAMPLE, place[1] * OVERSAMPLE)
            draw_shape(ImageDraw.Draw(image), SHAPES[shape], centre, size * OVERSAMPLE, fill)
            frames.append(reduce(image))
        return frames
