"""What a user hands over: one item, checked field by field before any work is done."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from ume_models.errors import ItemError

MediaSource: TypeAlias = "str | Path | bytes | Image.Image"

FIELDS = ("text", "image", "images", "video", "instruction", "id")


@dataclass(frozen=True)
class Item:
    """One input of an embedder.

    Attributes:
        text: the text, may be empty if there is media.
        images: still images, in order.
        video: frames in order, or ``None``. An item has images or a video, not both.
        instruction: task instruction, placed in front of the text with one space between.
        id: the caller's name for the item; its position as a string if none was given.
    """

    text: str = ""
    images: tuple[MediaSource, ...] = ()
    video: tuple[MediaSource, ...] | None = None
    instruction: str = ""
    id: str = ""

    @property
    def is_empty(self) -> bool:
        """True when there is neither media nor a single character of text or instruction."""
        return not (self.text or self.instruction or self.images or self.video)


def parse_item(
    obj: Mapping[str, Any] | Item,
    index: int,
    base_dir: str | Path | None = None,
    *,
    allow_empty: bool = False,
) -> Item:
    """Check one input and bring it into the form of :class:`Item`.

    A field that is ``None`` counts as absent.

    Args:
        obj: mapping with the fields ``text``, ``image`` or ``images``, ``video`` (a list of
            frames), ``instruction``, ``id``; or an :class:`Item`, which is checked too.
        index: position in the caller's sequence, for errors and as the default id.
        base_dir: directory that relative paths are relative to (default: the working directory).
        allow_empty: accept an item without text, instruction and media.

    Raises:
        ItemError: for unknown fields, wrong types, conflicting fields or an empty item.
    """
    if isinstance(obj, Item):
        fields: dict[str, Any] = {
            "text": obj.text,
            "images": obj.images or None,
            "video": obj.video,
            "instruction": obj.instruction,
            "id": obj.id or None,
        }
    elif isinstance(obj, Mapping):
        fields = {key: value for key, value in obj.items() if value is not None}
    else:
        raise ItemError(
            f"expected a mapping such as {{'text': …, 'image': …}}, got {type(obj).__name__}", index
        )

    given_id = _parse_id(fields.get("id"), index)

    def fail(reason: str) -> ItemError:
        return ItemError(reason, index, given_id)

    unknown = [key for key in fields if key not in FIELDS]
    if unknown:
        raise fail(_unknown_field(unknown[0]))

    strings = {}
    for name in ("text", "instruction"):
        value = fields.get(name)
        value = "" if value is None else value
        if not isinstance(value, str):
            raise fail(f"'{name}' must be a string, got {type(value).__name__}")
        if not _is_unicode(value):
            raise fail(
                f"'{name}' contains lone surrogates and is not valid Unicode; clean it first"
            )
        strings[name] = value

    if "image" in fields and "images" in fields:
        raise fail("has both 'image' and 'images'; put all images in 'images'")
    if fields.get("video") is not None and ("image" in fields or fields.get("images") is not None):
        raise fail("has both images and a video; embed them as two items")

    base = None if base_dir is None else Path(base_dir)
    images: tuple[MediaSource, ...] = ()
    video: tuple[MediaSource, ...] | None = None
    try:
        if "image" in fields:
            images = (_parse_source(fields["image"], "image", base),)
        elif fields.get("images") is not None:
            images = _parse_sources(fields["images"], "images", base)
        if fields.get("video") is not None:
            video = _parse_sources(fields["video"], "video", base)
    except _FieldError as error:
        raise fail(str(error)) from None

    item = Item(
        text=strings["text"],
        images=images,
        video=video,
        instruction=strings["instruction"],
        id=given_id if given_id is not None else str(index),
    )
    if not allow_empty and _has_nothing_to_embed(item):
        raise fail("is empty: give it a text, an image or a video")
    return item


class _FieldError(Exception):
    pass


def _has_nothing_to_embed(item: Item) -> bool:
    has_media = bool(item.images) or item.video is not None
    return not has_media and not (item.text.strip() or item.instruction.strip())


def _parse_id(value: Any, index: int) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, Integral)):
        raise ItemError(f"'id' must be a string or an integer, got {type(value).__name__}", index)
    text = str(value)
    if not text or not _is_unicode(text):
        raise ItemError("'id' must be a non-empty, valid Unicode string; or leave it out", index)
    return text


def _unknown_field(name: Any) -> str:
    near = difflib.get_close_matches(str(name), FIELDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown field {name!r}{hint} (known fields: {', '.join(FIELDS)})"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_sources(value: Any, field: str, base_dir: Path | None) -> tuple[MediaSource, ...]:
    if not isinstance(value, (list, tuple)):
        what = "frames" if field == "video" else "images"
        raise _FieldError(
            f"'{field}' must be a list of {what} (paths, bytes or PIL images), got "
            f"{type(value).__name__}"
            + ("; extract the frames of a video file first" if field == "video" else "")
        )
    if not value:
        raise _FieldError(f"'{field}' is an empty list; leave the field out or fill it")
    return tuple(_parse_source(v, f"{field}[{i}]", base_dir) for i, v in enumerate(value))


def _parse_source(value: Any, field: str, base_dir: Path | None) -> MediaSource:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, PathLike)):
        raw = value if isinstance(value, str) else value.__fspath__()
        if isinstance(raw, bytes):
            raise _FieldError(f"'{field}' is a path made of bytes; use a str or pathlib.Path")
        if not raw:
            raise _FieldError(f"'{field}' is an empty path")
        scheme = raw.split(":", 1)[0].lower()
        if scheme in ("http", "https", "data", "file", "s3", "gs") and raw != scheme:
            raise _FieldError(
                f"'{field}' is a {scheme}: address; give a local path, or read it and pass bytes"
            )
        path = Path(raw)
        return path if base_dir is None else base_dir / path
    if isinstance(value, list):
        raise _FieldError(f"'{field}' is a list; use 'images' for several images")
    raise _FieldError(f"'{field}' must be a path, bytes or a PIL image, got {type(value).__name__}")
