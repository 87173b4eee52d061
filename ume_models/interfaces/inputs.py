"""What other libraries call an input — strings, images, arrays, dictionaries — as an item."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image

from ume_models.errors import ItemError
from ume_models.processing.items import FIELDS, Item, parse_item

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv")


def make_item(value: Any, index: int, prompt: str = "", *, paths: bool = False) -> Item:
    """One input as an :class:`Item`.

    Args:
        value: a string, an image (PIL, ``pathlib.Path``, bytes, or uint8 array ``[H, W, 3]``), a
            mapping with the fields of an item, or an :class:`Item`. Arrays and tensors of frames
            ``[T, …]`` may stand at ``"video"``.
        index: position for errors.
        prompt: put in front of the text, or of the instruction where there is one. Nothing is
            added in between; an image without text gets the prompt as its text.
        paths: strings that name an image file are images, as in sentence-transformers 5.4 and
            later. Otherwise every string is text.

    Raises:
        ItemError: the input cannot be embedded; says why and what to do.
    """
    if isinstance(value, (str, np.str_)):
        value = _from_string(str(value), index) if paths else {"text": str(value)}
    elif isinstance(value, (Image.Image, Path, bytes, bytearray)):
        value = {"image": value}
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        value = {"image": as_image(value, index)}
    elif isinstance(value, Mapping):
        value = _convert_media(value, index)
    elif isinstance(value, (list, tuple)):
        raise ItemError(
            "is a list: pairs and conversations have no single embedding; give one string, image "
            "or {'text': …, 'image': …} per input",
            index,
        )
    # The prompt alone is content enough, so emptiness is checked after it is added.
    item = parse_item(value, index, allow_empty=True)
    if prompt and item.instruction:
        item = replace(item, instruction=prompt + item.instruction)
    elif prompt:
        item = replace(item, text=prompt + item.text)
    return item


def as_image(value: np.ndarray | torch.Tensor, index: int) -> Image.Image:
    """A uint8 array ``[H, W, 3]`` or ``[3, H, W]`` as a PIL image."""
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ItemError(
            f"is an array {array.dtype} {tuple(array.shape)}; images are uint8 [H, W, 3] or "
            "[3, H, W], or PIL images",
            index,
        )
    return Image.fromarray(np.ascontiguousarray(array))


def describe_input(value: Any, limit: int = 60) -> str:
    """A short description of an input for errors where its position is unknown."""
    if isinstance(value, Mapping):
        value = {key: value[key] for key in value if value[key] is not None}
    text = repr(value).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _from_string(text: str, index: int) -> dict[str, Any]:
    url = text.startswith(("http://", "https://")) and " " not in text
    ending = text.lower()
    if url:
        try:
            ending = urlparse(text).path.lower()
        except ValueError:
            return {"text": text}
    image = ending.endswith(IMAGE_ENDINGS) or text.startswith("data:image/")
    video = ending.endswith(VIDEO_ENDINGS)
    if not (image or video) or not (url or text.startswith("data:") or os.path.isfile(text)):
        return {"text": text}
    as_text = "; if the string itself is meant, give {'text': …}"
    if video:
        raise ItemError(
            f"{text!r} is a video file; extract its frames and give {{'video': [frame, …]}}"
            + as_text,
            index,
        )
    if not os.path.isfile(text):
        raise ItemError(
            f"{text[:80]!r} is the address of an image; download it and give the path, its bytes "
            "or a PIL image" + as_text,
            index,
        )
    return {"image": text}


def _convert_media(value: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    if "role" in value and "content" in value:
        raise ItemError(
            "is a chat message; give the content itself, as {'text': …, 'image': …}", index
        )
    if "audio" in value and "audio" not in FIELDS:
        raise ItemError("has audio, which this model does not embed; leave it out", index)
    changed: dict[str, Any] = {}
    image = value.get("image")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        changed["image"] = as_image(image, index)
    video = value.get("video")
    if isinstance(video, (np.ndarray, torch.Tensor)) or (
        isinstance(video, (list, tuple))
        and any(isinstance(frame, (np.ndarray, torch.Tensor)) for frame in video)
    ):
        changed["video"] = [
            as_image(frame, index) if isinstance(frame, (np.ndarray, torch.Tensor)) else frame
            for frame in video
        ]
    return {**value, **changed} if changed else value
