"""The two target sizes an image passes through on its way into a Qwen2-VL vision tower.

The official pipeline resizes twice: first ``qwen_vl_utils.fetch_image`` (here: the *fetch* size),
then the Hugging Face image processor (the *model* size). Both keep the sides divisible by
``factor`` and the area inside limits, with slightly different rounding rules.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from ume_models.errors import ItemError

Extreme: TypeAlias = Literal["refuse", "square", "cut"]

MAX_ASPECT_RATIO = 200


def fetch_size(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: float,
    extreme: Extreme = "refuse",
) -> tuple[int, int]:
    """Target ``(height, width)`` of the fetch stage (``qwen_vl_utils`` 0.0.8).

    Sides are rounded to the nearest multiple of ``factor``, at least one; an area above
    ``max_pixels`` scales both sides down (floor), one below ``min_pixels`` up (ceil).

    Raises:
        ItemError: if one side is more than 200 times the other (unless ``extreme`` is ``"cut"``,
            which cuts the result instead), or a side is zero.
    """
    if extreme != "cut":
        _check_shape(height, width)
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    new_height, new_width = _into_limits(
        height, width, new_height, new_width, factor, min_pixels, max_pixels
    )
    if extreme == "cut":
        new_height = min(new_height, MAX_ASPECT_RATIO * new_width)
        new_width = min(new_width, MAX_ASPECT_RATIO * new_height)
    return new_height, new_width


def model_size(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    extreme: Extreme = "refuse",
    *,
    given: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Target ``(height, width)`` of the Hugging Face Qwen2-VL image processor.

    As :func:`fetch_size`, but a side may round to zero before the lower limit is applied.
    ``given`` is the size before the fetch stage, for the message.

    Raises:
        ItemError: if one side is more than 200 times the other, or a side is zero. With
            ``extreme="square"`` such a picture, and one with a side of less than ``factor``, is
            measured as the square of its longer side.
    """
    if extreme == "square" and (
        min(height, width) < factor or max(height, width) > MAX_ASPECT_RATIO * min(height, width)
    ):
        height = width = max(factor, height, width)
    _check_shape(height, width, given)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    return _into_limits(height, width, new_height, new_width, factor, min_pixels, max_pixels)


def _into_limits(
    height: int,
    width: int,
    new_height: int,
    new_width: int,
    factor: int,
    min_pixels: int,
    max_pixels: float,
) -> tuple[int, int]:
    if new_height * new_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def _check_shape(height: int, width: int, given: tuple[int, int] | None = None) -> None:
    if height < 1 or width < 1:
        raise ItemError(f"has no pixels ({width}x{height})")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        first = "" if given in (None, (height, width)) else f"{given[1]}x{given[0]}, resized to "
        raise ItemError(
            f"is {first}{width}x{height}: one side is more than {MAX_ASPECT_RATIO} times the "
            "other, which the vision tower cannot take; crop or pad it"
        )
