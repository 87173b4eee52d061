from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from ume_models.errors import ItemError
from ume_models.processing.media import decode_rgb, read_header


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def jpeg(noise: Any) -> bytes:
    return encoded(noise(60, 40), "JPEG")


def test_header_of_path_bytes_and_pil(tmp_path: Path, jpeg: bytes, noise: Any) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg)
    for source in (path, str(path), jpeg, noise(60, 40)):
        header = read_header(source)
        assert (header.height, header.width) == (40, 60)
    assert read_header(path).digest == read_header(jpeg).digest


def test_digest_depends_on_content_only(tmp_path: Path, noise: Any) -> None:
    first, second = encoded(noise(60, 40), "PNG"), encoded(noise(60, 40, seed=1), "PNG")
    assert read_header(first).digest == read_header(bytes(bytearray(first))).digest
    assert read_header(first).digest != read_header(second).digest
    assert read_header(noise(60, 40)).digest == read_header(noise(60, 40)).digest
    assert read_header(noise(60, 40)).digest != read_header(noise(60, 40, seed=1)).digest
    # the same bytes in another shape, and the same indices with another palette
    assert read_header(noise(60, 40)).digest != read_header(noise(40, 60)).digest
    dark, light = Image.new("P", (8, 8)), Image.new("P", (8, 8))
    dark.putpalette([0, 0, 0])
    light.putpalette([255, 255, 255])
    assert read_header(dark).digest != read_header(light).digest


def sprite(rgb: list[int]) -> Image.Image:
    image = Image.new("P", (8, 8))
    image.putpalette(rgb * 4)
    return image


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(255)
    return image


def test_pictures_that_look_different_are_told_apart() -> None:
    red, blue = [200, 30, 30], [30, 30, 200]
    clear, faint = sprite(red), sprite(red)
    clear.info["transparency"], faint.info["transparency"] = 0, bytes([128])
    turned = sprite(red)
    turned.getexif()[0x112] = 6
    pairs: list[tuple[Image.Image, Image.Image, dict[str, bool]]] = [
        (with_alpha(sprite(red)), with_alpha(sprite(blue)), {}),
        (clear, sprite(red), {}),  # goes through JPEG or not
        (clear, faint, {"as_seen": True}),
        (noise_grey(0), noise_grey(1), {"as_seen": True}),
    ]
    for one, other, options in pairs:
        assert read_header(one, **options).digest != read_header(other, **options).digest
    # What is not looked at makes no difference.
    assert read_header(turned).digest == read_header(sprite(red)).digest


def noise_grey(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, 65535, (8, 8), np.uint16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_as_seen_is_upright(noise: Any, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(noise(40, 24), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode_rgb(data, as_seen=True)), np.asarray(upright))
    header = read_header(data, as_seen=True)
    assert (header.width, header.height) == upright.size
    assert read_header(data).width == 40
    assert len(read_header(data).unlike) == (orientation > 1)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(decode_rgb(opened, as_seen=True)), np.asarray(upright))


def test_as_seen_scales_to_8_bits_and_lays_on_white() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), np.uint16)
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert len(read_header(image).unlike) == 1
        seen = np.asarray(decode_rgb(image, as_seen=True))
        assert np.array_equal(seen[..., 0], deep // 256)
    ramp = np.linspace(-2, 3, 64, dtype=np.float32).reshape(8, 8)
    seen = np.asarray(decode_rgb(Image.fromarray(ramp), as_seen=True))[..., 1]
    assert (seen.min(), seen.max()) == (0, 255)
    assert np.array_equal(seen, np.sort(seen, axis=None).reshape(8, 8))
    ramp[0, :3] = [np.nan, np.inf, -np.inf]
    holed = np.asarray(decode_rgb(Image.fromarray(ramp), as_seen=True))[..., 1]
    assert holed[0, :3].tolist() == [0, 255, 0]
    for flat in (np.zeros_like(ramp), np.full_like(ramp, np.nan)):
        assert np.asarray(decode_rgb(Image.fromarray(flat), as_seen=True)).max() == 0
    clear = sprite([200, 30, 30])
    clear.info["transparency"] = 0
    for image in (clear, Image.new("LA", (8, 8), (9, 0)), Image.new("RGBA", (8, 8))):
        assert np.asarray(decode_rgb(image, as_seen=True)).min() == 255


def test_header_does_not_decode(jpeg: bytes) -> None:
    assert read_header(jpeg[: len(jpeg) // 2]).width == 60


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_truncated_data(format: str, keep: float, noise: Any) -> None:
    data = encoded(noise(200, 150), format)
    with pytest.raises(ItemError, match=r"truncated|cannot be decoded|not an image"):
        decode_rgb(data[: int(len(data) * keep)])


def test_truncated_jpeg_says_so(jpeg: bytes) -> None:
    with pytest.raises(ItemError, match=r"is truncated .* download it again"):
        decode_rgb(jpeg[: len(jpeg) // 2])
    lazy = Image.open(io.BytesIO(jpeg[: len(jpeg) // 2]))
    with pytest.raises(ItemError, match="is truncated"):
        read_header(lazy)


@pytest.mark.parametrize("read", [read_header, decode_rgb])
def test_unusable_files(read: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    expected = {
        "absent.png": "does not exist",
        "empty.png": "empty file|not an image",
        "text.png": "not an image",
        ".": "is a directory",
        "nul\0.png": "cannot be read",
        "x" * 5000: "cannot be read",
    }
    for name, message in expected.items():
        with pytest.raises(ItemError, match=message):
            read(f"{tmp_path}/{name}")
    with pytest.raises(ItemError, match="not an image"):
        read(b"no image")


def test_empty_bytes_and_images_without_pixels() -> None:
    with pytest.raises(ItemError, match="0 bytes"):
        read_header(b"")
    with pytest.raises(ItemError, match=r"no pixels \(0x5\)"):
        read_header(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("read", [read_header, decode_rgb])
def test_own_pixel_limit(read: Any, noise: Any) -> None:
    data = encoded(noise(60, 40), "PNG")
    assert read(data, 2400)
    with pytest.raises(ItemError, match=r"60x40 = 2400 pixels, over the limit of 2399.*raise max"):
        read(data, 2399)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def test_huge_image_is_refused_by_its_header() -> None:
    # A PNG that claims 20000 x 20000 pixels and holds none.
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    with pytest.raises(ItemError, match=r"400000000 pixels.*raise both"):
        read_header(data)


@pytest.fixture
def pillow_limit() -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 1000
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.mark.usefixtures("pillow_limit")
def test_pillows_own_limit_is_reported_with_both_remedies(noise: Any) -> None:
    with pytest.raises(ItemError, match=r"PIL.Image.MAX_IMAGE_PIXELS and max_image_pixels"):
        read_header(encoded(noise(60, 40), "PNG"))


def test_process_wide_settings_are_left_alone(jpeg: bytes) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    read_header(jpeg)
    decode_rgb(jpeg)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_exif_orientation_is_not_applied(noise: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(60, 40), "JPEG", exif=exif)
    assert decode_rgb(data).size == (60, 40)


def test_transparency_is_dropped_or_rgba_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 51))
    assert np.asarray(decode_rgb(image))[0, 0].tolist() == [10, 20, 30]
    blended = [round((part * 51 + 255 * 204) / 255) for part in (10, 20, 30)]
    assert np.asarray(decode_rgb(image, on_white=True))[0, 0].tolist() == blended
    grey = Image.new("LA", (2, 2), (10, 0))
    assert np.asarray(decode_rgb(grey, on_white=True))[0, 0].tolist() == [10, 10, 10]


def test_small_pictures_become_squares_in_their_own_mode() -> None:
    image = Image.new("P", (20, 40), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert decode_rgb(image, square_below=20).size == (20, 40)
    square = decode_rgb(image, square_below=21)
    assert square.size == (42, 42)
    assert np.unique(np.asarray(square).reshape(-1, 3), axis=0).tolist() == [[200, 100, 50]]


def test_animation_gives_its_first_frame() -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert np.asarray(decode_rgb(data))[0, 0].tolist() == [255, 0, 0]


def test_jpeg_round_trip_changes_opaque_images_only(noise: Any) -> None:
    image = noise(60, 40)
    expected = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG"))))
    assert np.array_equal(np.asarray(decode_rgb(image, through_jpeg=True)), expected)
    assert not np.array_equal(expected, np.asarray(image))
    rgba = image.convert("RGBA")
    assert np.array_equal(np.asarray(decode_rgb(rgba, through_jpeg=True)), np.asarray(image))
