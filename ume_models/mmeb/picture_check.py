"""Whether pictures can be opened: their heads and ends are read, a few are decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from PIL import Image, UnidentifiedImageError

from ume_models.errors import ItemError
from ume_models.processing.config import ImageConfig
from ume_models.processing.items import MediaSource
from ume_models.processing.media import decode_rgb, regular_file
from ume_models.processing.resize import MAX_ASPECT_RATIO, fetch_size
from ume_models.processing.rules import FETCH_MAX_PIXELS, FETCH_MIN_PIXELS

Wrong = tuple[Literal["missing", "damaged"], str]

# How complete files end. Others are decoded to find out.
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_LONGEST_END = max(map(len, _ENDS.values()))


_Size: TypeAlias = tuple[int, int]


class PictureCheck:
    """Remembers the files it has seen; safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Wrong | None, _Size | None]] = {}

    def wrong(self, source: MediaSource, *, decode: bool) -> Wrong | None:
        """What is wrong with a picture, and why; None if nothing was found.

        Args:
            source: a file, the bytes of one, or a picture, which is not looked at.
            decode: decode it even if it looks complete.
        """
        if isinstance(source, Image.Image):
            return None
        if isinstance(source, bytes):
            return _look(source, decode)[0]
        path = str(source)
        if path not in self._known:
            self._known[path] = _look(source, decode)
        return self._known[path][0]

    def frame_size(self, path: str | Path) -> _Size | None:
        """Width and height that a frame is embedded with, before the model's own limits.

        Frames of one video must agree in it. None if the file is damaged, or not looked at yet.
        """
        size = self._known.get(str(path), (None, None))[1]
        if size is None:
            return None
        height, width = fetch_size(
            size[1], size[0], ImageConfig().factor, FETCH_MIN_PIXELS, FETCH_MAX_PIXELS
        )
        return width, height


def _look(source: bytes | str | Path, decode: bool) -> tuple[Wrong | None, _Size | None]:
    """What is wrong; if nothing is, width and height as well."""
    try:
        complete, size = _head_and_end(source)
        if not complete or decode:
            decode_rgb(source)
        return None, size
    except FileNotFoundError:
        return ("missing", ""), None
    except ItemError as error:
        return ("damaged", error.reason), None
    except UnidentifiedImageError:
        return ("damaged", "it is not a picture"), None
    except (OSError, ValueError) as error:
        return ("damaged", getattr(error, "strerror", None) or str(error)), None
    except Exception as error:  # decoders raise whatever they like on malformed heads
        return ("damaged", f"{type(error).__name__}: {error}"), None


def _opened(source: bytes | str | Path) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else regular_file(source)


def _head_and_end(source: bytes | str | Path) -> tuple[bool, _Size]:
    """Whether a picture ends as files of its format end, and its width and height.

    Raises:
        ItemError: the vision tower cannot take its shape.
        OSError: it cannot be opened, or is not a picture.
    """
    with _opened(source) as file:
        if not file.read(1):
            raise ItemError("it is empty (0 bytes)")
        file.seek(0)
        with Image.open(file) as image:
            form, (width, height) = image.format, image.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ItemError(
                    f"it is {width}x{height}, and one side may be at most {MAX_ASPECT_RATIO} times "
                    "the other"
                )
            end = _ENDS.get(form or "")
            if end is None:
                return False, (width, height)
            file.seek(0, io.SEEK_END)
            file.seek(max(0, file.tell() - _LONGEST_END))
            return file.read().endswith(end), (width, height)
