"""Simple charts: a titled bar or line chart of four labelled categories, one of them highest."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from .base import Family, Spec
from .drawing import COLOURS, font, tint, with_article

_COLOURS = tuple(COLOURS)
_KINDS = ("bar", "line")
_TOPICS = (
    "sales", "rain", "visits", "costs", "trains", "calls", "apples", "fish", "energy", "snow",
)  # fmt: skip
_SERIES = (
    ("month", ("January", "February", "March", "April")),
    ("month", ("May", "June", "July", "August")),
    ("month", ("September", "October", "November", "December")),
    ("day", ("Monday", "Tuesday", "Wednesday", "Thursday")),
    ("city", ("Rome", "Oslo", "Lima", "Cairo")),
)


class Charts(Family):
    """Spec ``(kind, colour, topic, series, highest category)``."""

    name = "chart"
    slots = (len(_KINDS), len(COLOURS), len(_TOPICS), len(_SERIES), 4)
    size = (112, 112)

    def specs(self) -> Sequence[Spec]:
        return [
            (kind, colour, topic, series, highest)
            for kind in range(len(_KINDS))
            for colour in range(len(COLOURS))
            for topic in range(len(_TOPICS))
            for series in range(len(_SERIES))
            for highest in range(4)
        ]

    def caption(self, spec: Spec, rng: Random) -> str:
        kind, colour, topic, series, highest = spec
        unit, names = _SERIES[series]
        what = f"{_TOPICS[topic]} by {unit}, highest in {names[highest]}"
        if rng.random() < 0.5:
            return f"{what}, {_COLOURS[colour]} {_KINDS[kind]} chart"
        return f"{with_article(_COLOURS[colour])} {_KINDS[kind]} chart of {what}"

    def attributes(self, spec: Spec) -> tuple[int, ...]:
        return spec

    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        kind, colour, topic, series, highest = spec
        image = Image.new("RGB", self.size, tint(rng, (250, 250, 250), 5))
        draw = ImageDraw.Draw(image)
        ink = tint(rng, (40, 40, 40), 20)
        fill = tint(rng, COLOURS[_COLOURS[colour]], 14)
        draw.text((6 + rng.randint(-1, 3), 1 + rng.randint(-1, 1)), _TOPICS[topic], ink, font(18))
        base, top = 94, 26
        values = [rng.uniform(0.15, 0.72) for _ in range(4)]
        values[highest] = rng.uniform(0.9, 1.0)
        places = [(14 + 28 * i, base - value * (base - top)) for i, value in enumerate(values)]
        if kind == 0:
            half = rng.randint(7, 10)
            for x, y in places:
                draw.rectangle((x - half, y, x + half, base), fill=fill)
        else:
            draw.line(places, fill=fill, width=3)
            for x, y in places:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=fill)
        draw.line((2, base, 110, base), fill=ink, width=1)
        for i, name in enumerate(_SERIES[series][1]):
            draw.text((14 + 28 * i, base + 2), name[:3], ink, font(12), anchor="ma")
        return [image]
