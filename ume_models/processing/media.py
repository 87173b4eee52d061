"""Reading images: sizes and content hashes from headers at plan time, pixels at load time."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from ume_models.errors import ErrorKind, ItemError
from ume_models.processing.items import MediaSource

DEFAULT_MAX_IMAGE_PIXELS = 2 * 89_478_485
_CHUNK = 1 << 20


@dataclass(frozen=True)
class MediaHeader:
    """What is known of an image without decoding it.

    Attributes:
        height: in pixels, as decoded.
        width: in pixels.
        digest: BLAKE2b of the file's bytes, or of the pixels of a PIL image, as stored and as
            decoded: its palette and its other notes count by what they do.
        unlike: how a viewer shows it otherwise than official codes embed it.
    """

    height: int
    width: int
    digest: bytes
    unlike: tuple[str, ...] = ()


def describe(source: MediaSource) -> str:
    """A short name of an image for error messages."""
    if isinstance(source, bytes):
        return f"bytes object of length {len(source)}"
    if isinstance(source, Image.Image):
        return f"PIL image, mode {source.mode}"
    return f"'{source}'"


def read_header(
    source: MediaSource,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    *,
    on_white: bool = False,
    as_seen: bool = False,
) -> MediaHeader:
    """Size and content hash of an image; files are streamed, never decoded.

    Args:
        source: path, encoded bytes, or PIL image, which is decoded.
        max_image_pixels: larger images are refused before anything is decoded.
        on_white, as_seen: as they will be for :func:`decode_rgb`.

    Raises:
        ItemError: missing or empty file, directory, not an image, no pixels, too many pixels.
    """
    if isinstance(source, Image.Image):
        return _read_pil_header(source, max_image_pixels, on_white, as_seen)
    if isinstance(source, bytes):
        if not source:
            raise ItemError("is empty (0 bytes)")
        return _read_file_header(io.BytesIO(source), max_image_pixels, as_seen)
    try:
        with regular_file(source) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ItemError("is an empty file (0 bytes); export or download it again")
            return _read_file_header(file, max_image_pixels, as_seen)
    except (OSError, ValueError) as error:
        raise _file_error(error) from error


def decode_rgb(
    source: MediaSource,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    *,
    through_jpeg: bool = False,
    on_white: bool = False,
    square_below: int = 0,
    as_seen: bool = False,
) -> Image.Image:
    """Decode an image fully and convert it with Pillow's ``convert("RGB")``.

    EXIF orientation is ignored and grey levels above 255 are white, as in the reference, unless
    ``as_seen``. The result may be the caller's own object, so it must not be changed.

    Truncated files raise, unlike in the official evaluation, which sets
    ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` for the whole process and embeds the grey rest. (If
    the calling process has set it, Pillow obeys that.)

    Args:
        source: path, encoded bytes, or PIL image.
        max_image_pixels: larger images are refused before anything is decoded.
        through_jpeg: encode as JPEG with Pillow's default quality and decode again, unless the
            image has transparency: what the official evaluation does to multi-image inputs.
        on_white: RGBA images are laid on white, as ``qwen_vl_utils`` does (and only those: other
            modes with transparency lose it). False drops the alpha channel.
        square_below: images with a side of fewer pixels become squares of twice that side, before
            the conversion: what the official code of VLM2Vec does.
        as_seen: what a viewer shows: turned upright by EXIF, 16-bit grey scaled to 8 bit, floats
            from their smallest value to their largest, anything transparent on white.

    Raises:
        ItemError: as :func:`read_header`, and for data that does not decode.
    """

    def convert(image: Image.Image) -> Image.Image:
        try:
            orientation = _orientation(image)  # before loading, as at plan time
            image.load()
            if as_seen:
                image = _as_seen(image, orientation)
            if min(image.size) < square_below:
                image = image.resize((2 * square_below, 2 * square_below))
            return _to_rgb(image, through_jpeg, on_white or as_seen)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like on malformed data
            raise _decode_error(error) from error

    if isinstance(source, Image.Image):
        return convert(source)
    if isinstance(source, bytes):
        with _open(io.BytesIO(source), max_image_pixels) as image:
            return convert(image)
    try:
        with regular_file(source) as file, _open(file, max_image_pixels) as image:
            return convert(image)
    except (OSError, ValueError) as error:
        raise _file_error(error) from error


def regular_file(path: str | Path) -> BinaryIO:
    """The opened file; pipes and devices are refused, since reading them may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ItemError("is a pipe, socket or device; save the image to a file")
    return open(path, "rb")


def file_key(path: str | Path) -> tuple[str, int, int] | None:
    """Identity of a file's content without reading it: path, modification time, size."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # the read that follows reports the reason
    return (os.path.abspath(path), found.st_mtime_ns, found.st_size)


def _read_pil_header(
    image: Image.Image, max_image_pixels: int, on_white: bool, as_seen: bool
) -> MediaHeader:
    _check_area(*image.size, max_image_pixels)
    try:
        pixels = image.tobytes()
    except (OSError, ValueError, SyntaxError) as error:
        raise _decode_error(error) from error
    shown = decode_rgb(image, max_image_pixels, on_white=on_white, as_seen=as_seen)
    state = _hasher(b"pil")
    about = (image.mode, image.size, shown.size, _has_alpha(image))  # alpha decides about JPEG
    state.update(repr(about).encode())
    state.update(pixels)
    if shown is not image:
        state.update(shown.tobytes())
    return MediaHeader(shown.height, shown.width, state.digest(), _unlike(image))


def _read_file_header(file: BinaryIO, max_image_pixels: int, as_seen: bool) -> MediaHeader:
    with _open(file, max_image_pixels) as image:
        (width, height), unlike = image.size, _unlike(image)
        if as_seen and _orientation(image) >= 5:
            width, height = height, width
    file.seek(0)
    state = _hasher(b"file")
    while chunk := file.read(_CHUNK):
        state.update(chunk)
    return MediaHeader(height, width, state.digest(), unlike)


def _open(file: BinaryIO, max_image_pixels: int) -> Image.Image:
    """Open lazily and check the area.

    Pillow has a process-wide limit of its own, which belongs to the user: it is neither changed
    nor needed, but where it is the stricter one it wins, and the message says so.
    """
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError(
            f"exceeds Pillow's own pixel limit ({error}); scale the image down, or, if you trust "
            "it, raise both PIL.Image.MAX_IMAGE_PIXELS and max_image_pixels",
            kind=ErrorKind.TOO_LARGE,
        ) from error
    except UnidentifiedImageError as error:
        raise ItemError(
            "is not an image that Pillow can read; convert it to PNG or JPEG"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on malformed headers
        raise _decode_error(error) from error
    try:
        _check_area(*image.size, max_image_pixels)
    except ItemError:
        image.close()
        raise
    return image


def _check_area(width: int, height: int, max_image_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ItemError(f"has no pixels ({width}x{height})")
    if width * height > max_image_pixels:
        raise ItemError(
            f"has {width}x{height} = {width * height} pixels, over the limit of "
            f"{max_image_pixels}; scale it down, or raise max_image_pixels if you trust it",
            kind=ErrorKind.TOO_LARGE,
        )


def _to_rgb(image: Image.Image, through_jpeg: bool, on_white: bool) -> Image.Image:
    if on_white and image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if through_jpeg and not _has_alpha(image):
        buffer = io.BytesIO()
        rgb.save(buffer, format="JPEG")
        rgb = Image.open(buffer)
        rgb.load()
    return rgb


_TURNS = dict(zip(range(2, 9), [
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
], strict=True))  # fmt: skip
"""What makes an image upright, by its EXIF orientation."""


def _orientation(image: Image.Image) -> int:
    png = isinstance(image, PngImagePlugin.PngImageFile)
    if png and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # getexif would decode the pixels to look behind them
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged: whatever its parser raises
        return 1


def _unlike(image: Image.Image) -> tuple[str, ...]:
    found = []
    if _is_deep(image):
        found.append("has more than 8 bits per pixel, and what is above 255 becomes white")
    if _orientation(image) in _TURNS:
        found.append("is turned by its EXIF data, which are ignored")
    return tuple(found)


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _as_seen(image: Image.Image, orientation: int) -> Image.Image:
    if _is_deep(image):
        values = np.asarray(image)
        if image.mode == "F":
            finite = values[np.isfinite(values)].astype(np.float64)
            low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
            values = (np.nan_to_num(values, nan=low).clip(low, high) - low) / (high - low or 1)
            values = values * 65535
        image = Image.fromarray((values.clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return image.convert("RGBA") if image.has_transparency_data else image


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA") or (image.mode == "P" and "transparency" in image.info)


def _decode_error(error: Exception) -> ItemError:
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return ItemError(f"is truncated ({error}); export or download it again")
    return ItemError(f"cannot be decoded ({type(error).__name__}: {error}); replace the file")


def _file_error(error: Exception) -> ItemError:
    if isinstance(error, FileNotFoundError):
        return ItemError("does not exist; check the path and the base directory")
    if isinstance(error, IsADirectoryError):
        return ItemError("is a directory; list the image files themselves")
    return ItemError(f"cannot be read: {getattr(error, 'strerror', None) or error}")


def _hasher(kind: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=20, person=kind)
