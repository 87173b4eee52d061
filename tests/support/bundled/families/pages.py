"""Text pages: a two-word title, a place, a contact and some lines of filler, all as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from .base import Family, Spec
from .drawing import font, tint

_SUBJECTS = (
    "Garden", "Harbour", "Winter", "Music", "Bridge", "School", "Forest", "Kitchen",
    "Museum", "River", "Theatre", "Bicycle",
)  # fmt: skip
_KINDS = ("report", "menu", "plan", "letter", "budget", "survey", "invoice", "guide")
_PLACES = ("Paris", "Berlin", "Madrid", "Tokyo", "Dublin", "Quito", "Boston", "Naples")


class Pages(Family):
    """Spec ``(subject, kind, place)``: what the page is about, what it is, where."""

    name = "page"
    slots = (len(_SUBJECTS), len(_KINDS), len(_PLACES))
    size = (112, 112)

    def specs(self) -> Sequence[Spec]:
        return [
            (subject, kind, place)
            for subject in range(len(_SUBJECTS))
            for kind in range(len(_KINDS))
            for place in range(len(_PLACES))
        ]

    def caption(self, spec: Spec, rng: Random) -> str:
        subject, kind, place = _SUBJECTS[spec[0]].lower(), _KINDS[spec[1]], _PLACES[spec[2]]
        if rng.random() < 0.5:
            return f"the {subject} {kind} from {place}"
        return f"which {kind} from {place} is about the {subject}?"

    def attributes(self, spec: Spec) -> tuple[int, ...]:
        return spec

    def render(self, spec: Spec, rng: Random, held_out: bool) -> list[Image.Image]:
        image = Image.new("RGB", self.size, tint(rng, (250, 248, 242), 5))
        draw = ImageDraw.Draw(image)
        ink = tint(rng, (35, 35, 40), 20)
        left = 6 + rng.randint(-2, 2)
        draw.text((left, 1 + rng.randint(-1, 1)), _SUBJECTS[spec[0]], ink, font(21))
        draw.text((left, 27 + rng.randint(-1, 1)), _KINDS[spec[1]], ink, font(21))
        draw.text((left, 57 + rng.randint(-1, 1)), _PLACES[spec[2]], ink, font(18))
        y = 84.0
        while y < 108:
            draw.line((left, y, rng.randint(60, 104), y), fill=(165, 165, 170), width=2)
            y += rng.uniform(6, 8)
        return [image]
