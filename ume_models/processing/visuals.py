"""One visual block of a prompt, a picture or a clip: its sizes first, then its patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from ume_models.errors import ItemError
from ume_models.processing import media
from ume_models.processing.config import ImageConfig
from ume_models.processing.items import MediaSource
from ume_models.processing.patches import (
    ByteArray,
    FloatArray,
    make_patches,
    normalise_table,
    resize,
    resize_smoothly,
)
from ume_models.processing.resize import fetch_size, model_size
from ume_models.processing.rules import MediaRules

Grid: TypeAlias = "tuple[int, int, int]"
Size: TypeAlias = "tuple[int, int]"
Decoded: TypeAlias = "dict[int | str, ByteArray]"


@dataclass(frozen=True)
class VisualPlan:
    """One visual block: a still image (one frame) or a video. Sizes are ``(height, width)``.

    Attributes:
        sources: the frames; labels, sizes and fetch sizes run parallel to it.
        labels: names for error messages.
        source_sizes: as decoded.
        fetch_sizes: after the first resize.
        clip_size: after the second resize, which clips alone may have.
        size: after the last resize.
        grid: patches along ``(time, height, width)``.
        through_jpeg, square_below: see :func:`ume_models.processing.media.decode_rgb`.
    """

    sources: tuple[MediaSource, ...]
    labels: tuple[str, ...]
    source_sizes: tuple[Size, ...]
    fetch_sizes: tuple[Size, ...]
    clip_size: Size | None
    size: Size
    grid: Grid
    through_jpeg: bool
    square_below: int

    @property
    def num_patches(self) -> int:
        """Rows of pixel values: t · h · w."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class VisualProcessor:
    """Plans and loads visual blocks by the rules.

    Args:
        config: geometry of the patches.
        rules: conventions, within the checkpoint's limits.
        max_image_pixels: larger images are refused unread (decompression bombs).
    """

    def __init__(self, config: ImageConfig, rules: MediaRules, max_image_pixels: int) -> None:
        self.config = config
        self.rules = rules
        self.max_image_pixels = max_image_pixels
        self._table = normalise_table(config)
        self._on_white = rules.transparency == "white"
        self._as_seen = rules.pictures == "as_seen"

    def header(self, source: MediaSource) -> media.MediaHeader:
        """Size and content of a source, as :meth:`load` will decode it.

        Raises:
            ItemError: as :func:`ume_models.processing.media.read_header`.
        """
        return media.read_header(
            source, self.max_image_pixels, on_white=self._on_white, as_seen=self._as_seen
        )

    def plan(
        self,
        sources: tuple[MediaSource, ...],
        labels: tuple[str, ...],
        sizes: tuple[Size, ...],
        *,
        clip: bool = False,
        through_jpeg: bool = False,
    ) -> VisualPlan:
        """The sizes a block passes through; ``sizes`` are those of its sources.

        Raises:
            ItemError: a shape that the vision tower cannot take, or frames of several sizes.
        """
        config, rules = self.config, self.rules
        square_below = config.factor if rules.tiny_to_square and not clip else 0
        side = 2 * square_below
        sizes = tuple((side, side) if min(size) < square_below else size for size in sizes)
        together = clip and rules.clips == "together"
        fetched = tuple(
            self._fetch_size(size, label, together)
            for size, label in zip(sizes, labels, strict=True)
        )
        if not rules.mixed_frames:
            _check_equal(fetched, labels)
        with labelled(labels[0]):
            clip_size = self._clip_size(fetched[0], len(sources)) if together else None
            size = model_size(
                *(clip_size or fetched[0]),
                config.factor,
                rules.min_pixels,
                rules.max_pixels,
                rules.extreme,
                given=sizes[0],
            )
        time = -(-len(sources) // config.temporal_patch_size)
        grid = (time, size[0] // config.patch_size, size[1] // config.patch_size)
        return VisualPlan(
            sources, labels, sizes, fetched, clip_size, size, grid, through_jpeg, square_below
        )

    def load(self, visual: VisualPlan, decoded: Decoded) -> tuple[FloatArray, Grid]:
        """Patches and grid of a block.

        Args:
            visual: from :meth:`plan`.
            decoded: frames of the item made so far, by source; added to.

        Raises:
            ItemError: media that do not decode, or have changed since they were planned.
        """
        frames = []
        for position, source in enumerate(visual.sources):
            key = id(source) if isinstance(source, (bytes, Image.Image)) else str(source)
            if key not in decoded:
                with labelled(visual.labels[position]):
                    decoded[key] = self._load_frame(visual, position)
            frames.append(decoded[key])
        return make_patches(frames, self.config, self._table)

    def _fetch_size(self, size: Size, label: str, together: bool) -> Size:
        rules, factor = self.rules, self.config.factor
        if rules.fetch_min_pixels is None:
            return size
        # qwen-vl-utils 0.0.14 gives fetch_image the side of a token for that of a patch here, so
        # frames come to multiples of two tokens, and its limits count such squares.
        scale = 2 if together else 1
        with labelled(label):
            return fetch_size(
                *size,
                scale * factor,
                scale**2 * rules.fetch_min_pixels,
                scale**2 * rules.fetch_max_pixels,
                rules.extreme,
            )

    def _clip_size(self, size: Size, frames: int) -> Size:
        """Size of the frames of a clip in ``qwen_vl_utils.fetch_video``, 0.0.14."""
        rules = self.rules
        share = rules.clip_total_pixels / (frames + frames % 2) * 2
        most = max(min(rules.clip_max_pixels, share), int(rules.clip_min_pixels * 1.05))
        return fetch_size(*size, self.config.factor, rules.clip_min_pixels, most)

    def _load_frame(self, visual: VisualPlan, position: int) -> ByteArray:
        image = media.decode_rgb(
            visual.sources[position],
            self.max_image_pixels,
            through_jpeg=visual.through_jpeg,
            on_white=self._on_white,
            square_below=visual.square_below,
            as_seen=self._as_seen,
        )
        if (image.height, image.width) != visual.source_sizes[position]:
            raise ItemError("has changed since it was planned; plan the item again")
        image = resize(image, *visual.fetch_sizes[position])
        if visual.clip_size is not None and visual.clip_size != (image.height, image.width):
            frame = resize_smoothly(image, *visual.clip_size)
            if visual.clip_size == visual.size:
                return frame
            image = Image.fromarray(frame)
        return np.asarray(resize(image, *visual.size))


def _check_equal(sizes: tuple[Size, ...], labels: tuple[str, ...]) -> None:
    first = sizes[0]
    for size, label in zip(sizes, labels, strict=True):
        if size != first:
            # transformers stacks the frames after the fetch stage and fails there as well
            raise ItemError(
                f"{label} has another size than the first frame ({size[1]}x{size[0]}, not "
                f"{first[1]}x{first[0]}); crop or resize the frames to one size"
            )


class labelled:
    """Puts the name of the image in front of the reason of an error about it."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> Literal[False]:
        if isinstance(error, ItemError):
            raise error.at(None, reason=f"{self._label} {error.reason}") from error
        return False
