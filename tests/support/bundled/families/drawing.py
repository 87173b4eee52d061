"""Shapes, colours and fonts shared by the renderers."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 205, 30),
    "purple": (140, 50, 170),
    "orange": (240, 130, 20),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")


def with_article(word: str) -> str:
    """``word`` behind "a" or "an"."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


# Shapes are drawn this many times too large and reduced: smooth edges at a small cost.
OVERSAMPLE = 2


def tint(rng: Random, base: tuple[int, int, int], spread: int) -> tuple[int, int, int]:
    """``base`` moved by up to ``spread`` per channel, clipped to 0–255."""
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in base)
    return r, g, b


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    fill: tuple[int, int, int],
) -> None:
    """Draw ``shape`` of about ``radius`` around ``centre`` (both in canvas pixels)."""
    x, y = centre
    r = radius
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        s = r * 0.88
        draw.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=fill)
    elif shape == "cross":
        t = r * 0.34
        draw.rectangle((x - r, y - t, x + r, y + t), fill=fill)
        draw.rectangle((x - t, y - r, x + t, y + r), fill=fill)
    elif shape == "star":
        points = []
        for i in range(10):
            reach = 1.1 * r if i % 2 == 0 else 0.45 * r
            angle = math.pi * i / 5 - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def canvas(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """An RGB canvas ``OVERSAMPLE`` times larger than ``size``."""
    return Image.new("RGB", (size[0] * OVERSAMPLE, size[1] * OVERSAMPLE), colour)


def reduce(image: Image.Image) -> Image.Image:
    """The canvas at its final size."""
    return image.reduce(OVERSAMPLE)


_FONTS: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's bundled font, so that no font file has to be found on the machine."""
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]
