"""Small copies of pictures as data URIs, each stored once per page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, features

from ume_models.errors import ItemError
from ume_models.processing.items import MediaSource
from ume_models.processing.media import decode_rgb, describe


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page.

    Attributes:
        key: name of the picture within the page; empty where it could not be read.
        width, height: in pixels.
        uri: ``data:`` address.
        problem: why there is no picture, else empty.
    """

    key: str
    width: int
    height: int
    uri: str
    problem: str = ""


class Thumbnails:
    """Collects the pictures of one page; a file used twice is embedded once.

    Args:
        max_side: longer side of a thumbnail in pixels; smaller pictures keep their size.
    """

    def __init__(self, max_side: int = 224) -> None:
        self._max_side = max_side
        self._by_source: dict[object, Thumbnail] = {}
        self._by_uri: dict[str, Thumbnail] = {}

    def add(self, source: MediaSource) -> Thumbnail:
        """The thumbnail of a picture; never raises, an unreadable one says why instead."""
        name: object = id(source) if isinstance(source, Image.Image) else source
        if name not in self._by_source:
            self._by_source[name] = self._make(source)
        return self._by_source[name]

    def add_all(self, sources: Sequence[MediaSource]) -> tuple[Thumbnail, ...]:
        """Thumbnails of several pictures."""
        return tuple(map(self.add, sources))

    @property
    def pictures(self) -> list[Thumbnail]:
        """All different readable pictures, in the order they were added."""
        return list(self._by_uri.values())

    def _make(self, source: MediaSource) -> Thumbnail:
        try:
            image = decode_rgb(source).copy()
        except ItemError as error:
            return Thumbnail("", 0, 0, "", f"{describe(source)} {error.reason}")
        image.thumbnail((self._max_side, self._max_side))
        uri = _data_uri(image)
        return self._by_uri.setdefault(
            uri, Thumbnail(f"p{len(self._by_uri)}", image.width, image.height, uri)
        )


def _data_uri(image: Image.Image) -> str:
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
