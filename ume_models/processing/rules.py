"""Conventions of pixels as data: everything about pictures and clips that is not geometry."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from ume_models.errors import OptionError
from ume_models.processing.config import ImageConfig

FETCH_MIN_PIXELS = 4 * 28 * 28
FETCH_MAX_PIXELS = 16384 * 28 * 28

MultiImage: TypeAlias = Literal["all", "first", "middle", "refuse"]
Pictures: TypeAlias = Literal["official", "as_seen"]


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """An option that counts something, from Python or NumPy, as an int.

    Raises:
        OptionError: it is none, or less than ``least``.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise OptionError(f"{name} must be a whole number, at least {least}, got {value!r}")
    return number


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "multi_image": (None, "all", "first", "middle", "refuse"),
    "clips": ("frames", "together", "middle", "refuse"),
    "transparency": ("drop", "white"),
    "pictures": ("official", "as_seen"),
    "extreme": ("refuse", "square", "cut"),
}


@dataclass(frozen=True)
class MediaRules:
    """How pictures and clips become pixels, in the order of the steps.

    The defaults are those this package had before there were profiles.

    Attributes:
        multi_image: what lists of two or more pictures do. ``"all"``: a visual block for each.
            ``"first"``: the first one alone, after a JPEG round trip, as one evaluation does.
            ``"middle"``: the one at index ``n // 2``. ``"refuse"``. None: refused with the choice.
        clips: what becomes of the frames of a clip. ``"frames"``: each one passes the steps of a
            picture (qwen-vl-utils up to 0.0.11). ``"together"``: they are resized a second time,
            within limits of their own (0.0.14). ``"middle"``: the frame at index ``n // 2``, as a
            picture. ``"refuse"``.
        max_frames: most frames of a clip; a longer one is thinned out evenly. None: no limit.
        mixed_frames: frames of several sizes are brought to that of the first; or refused.
        transparency: RGBA pictures are laid on ``"white"``; or the alpha channel is ``"drop"``ped,
            which happens to every other mode in any case.
        pictures: ``"official"`` pixels, or ``"as_seen"``: those that a viewer shows, see
            ``as_seen`` of :func:`ume_models.processing.media.decode_rgb`.
        tiny_to_square: pictures with a side of less than one token become 2 x 2 tokens first.
        extreme: sides in a proportion of more than 200. ``"refuse"``; ``"square"``: a square of
            the longer side (and of at least one token); ``"cut"``: the longer side is cut to 200
            times the shorter one after the first resize.
        fetch_min_pixels, fetch_max_pixels: area after the first resize; None turns it off.
        clip_min_pixels, clip_max_pixels, clip_total_pixels: area of a frame, and of all frames of
            a clip over the two that make a patch, after the second resize of ``"together"``.
        min_pixels, max_pixels: area after the last resize, that of the image processor.
        stored_limit: a smaller maximum in the checkpoint counts, since such a model has never seen
            larger pictures. Official codes override whatever the checkpoint says.
    """

    multi_image: MultiImage | None = None
    clips: Literal["frames", "together", "middle", "refuse"] = "frames"
    max_frames: int | None = None
    mixed_frames: bool = False
    transparency: Literal["drop", "white"] = "drop"
    pictures: Pictures = "official"
    tiny_to_square: bool = False
    extreme: Literal["refuse", "square", "cut"] = "refuse"
    fetch_min_pixels: int | None = FETCH_MIN_PIXELS
    fetch_max_pixels: int = FETCH_MAX_PIXELS
    clip_min_pixels: int = 128 * 28 * 28
    clip_max_pixels: int = 768 * 28 * 28
    clip_total_pixels: int = 115_200 * 28 * 28
    min_pixels: int = 784
    max_pixels: int = 2_359_296
    stored_limit: bool = True

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise OptionError(f"{name} must be one of {choices}; got {getattr(self, name)!r}")
        for name in ("max_frames", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if name != "max_frames" or value is not None:
                object.__setattr__(self, name, whole_number(name, value, 1))
        if self.max_pixels < self.min_pixels:
            raise OptionError(
                f"max_pixels ({self.max_pixels}) must be at least min_pixels ({self.min_pixels})"
            )

    def for_checkpoint(
        self, config: ImageConfig, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> MediaRules:
        """These rules within the limits given, or within those of a checkpoint.

        Raises:
            OptionError: the limits given exclude each other or do not hold one token.
        """
        stored = config.stored_max_pixels if self.stored_limit else None
        largest = min(self.max_pixels, stored or self.max_pixels)
        most = largest if max_pixels is None else max_pixels
        least = min(self.min_pixels, most) if min_pixels is None else min_pixels
        if most < config.factor**2:
            token = config.factor**2
            raise OptionError(f"max_pixels ({most}) must hold one token ({token} pixels)")
        return replace(self, min_pixels=least, max_pixels=most)

    def frame_positions(self, length: int) -> list[int]:
        """Which frames of a clip are used."""
        if self.clips == "middle":
            return [length // 2]
        return sampled_positions(length, self.max_frames or length)


def sampled_positions(length: int, count: int) -> list[int]:
    """Which of ``length`` frames stand for a video: first, last, and evenly between, rounded down.

    All of them where there are fewer than ``count``.
    """
    if count > length:
        return list(range(length))
    return [int(position) for position in np.linspace(0, length - 1, count, dtype=int)]
