"""Items to model inputs: a cheap plan for all of them, then full decoding one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ume_models.errors import CheckpointError, ItemError
from ume_models.processing import media
from ume_models.processing.config import ImageConfig
from ume_models.processing.items import Item, MediaSource, parse_item
from ume_models.processing.patches import (
    ByteArray,
    FloatArray,
    make_patches,
    normalise_table,
    resize,
)
from ume_models.processing.prompt import (
    EMPTY_TEXT,
    Layout,
    MediaKind,
    PromptTemplate,
    clean_text,
    join_text,
)
from ume_models.processing.resize import fetch_size, model_size
from ume_models.processing.tokens import Prompt, PromptTokenizer

ItemKind: TypeAlias = Literal["text", "image", "video"]
Grid: TypeAlias = "tuple[int, int, int]"


@dataclass(frozen=True)
class VisualPlan:
    """One visual block of a prompt: a still image (one frame) or a video.

    Attributes:
        sources: the frames; sizes and labels run parallel to it.
        labels: names for error messages.
        source_sizes: ``(height, width)`` as the headers say.
        fetch_size: ``(height, width)`` after the first resize, ``None`` without fetch stage.
        size: ``(height, width)`` after the second resize.
        grid: patches along ``(time, height, width)``.
        through_jpeg: see :func:`ume_models.processing.media.decode_rgb`.
    """

    sources: tuple[MediaSource, ...]
    labels: tuple[str, ...]
    source_sizes: tuple[tuple[int, int], ...]
    fetch_size: tuple[int, int] | None
    size: tuple[int, int]
    grid: Grid
    through_jpeg: bool = False

    @property
    def num_patches(self) -> int:
        """Rows of pixel values: t · h · w."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class PlannedItem:
    """What is known of an item before its media are decoded.

    Attributes:
        index: position in the caller's sequence.
        id: the item's id.
        digest: hex content hash of prompt, media bytes and settings; equal digests mean equal
            inputs of the model. Empty for an item with an error.
        num_tokens: length of ``input_ids`` with expanded visual tokens.
        num_patches: rows of pixel values.
        kind: which input class the item belongs to.
        error: why the item cannot be embedded, or ``None``.
        header: ``"text"`` if the prompt begins with the constant header of text-only items
            (system turn and blank image), else ``None``.
        token_ids: int32 ids of the prompt, one pad per visual block.
        visuals: the visual blocks to decode (not the blank image).
    """

    index: int
    id: str
    digest: str = ""
    num_tokens: int = 0
    num_patches: int = 0
    kind: ItemKind = "text"
    error: ItemError | None = None
    header: Literal["text"] | None = None
    token_ids: npt.NDArray[np.int32] | None = None
    visuals: tuple[VisualPlan, ...] = ()


@dataclass(frozen=True)
class PreparedItem:
    """Inputs of the model for one item, in Hugging Face processor layout.

    Attributes:
        index, id, digest, header: as in :class:`PlannedItem`.
        input_ids: int64 ``[n]``, prompt with expanded visual tokens, without the assistant prefix.
        pixel_values: float32 ``[patches, 3·T·p·p]`` of the images, or ``None``. That of the
            blank image is shared between items: do not write to it.
        image_grid_thw: int64 ``[images, 3]``, or ``None``.
        pixel_values_videos: float32 ``[patches, 3·T·p·p]`` of the video, or ``None``.
        video_grid_thw: int64 ``[1, 3]``, or ``None``.
    """

    index: int
    id: str
    digest: str
    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    header: Literal["text"] | None = None


class Processor:
    """Turns items into model inputs exactly as the official evaluation does.

    Args:
        tokenizer: the checkpoint's tokenizer, with its chat template.
        config: image geometry and limits.
        multi_image: what to do with items of two or more images. ``None`` (default): refuse
            them and name the choice. ``"all"``: a visual block for every image. ``"first"``: what
            the official evaluation does, which keeps only the first one, after a JPEG round trip.
        text_only_image: put the constant blank image in front of items without media, as the
            official evaluation does.
        empty: ``"error"``, or ``"reference"`` to embed an item without any content as the
            official evaluation does (two spaces, no image).
        max_image_pixels: larger images are refused unread (decompression bombs).

    ``plan`` and ``load`` keep no state between calls; ``load`` may run in several threads.

    Raises:
        CheckpointError: if the tokenizer lacks the chat template or one of the tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: ImageConfig,
        *,
        multi_image: Literal["all", "first"] | None = None,
        text_only_image: bool = True,
        empty: Literal["error", "reference"] = "error",
        max_image_pixels: int = media.DEFAULT_MAX_IMAGE_PIXELS,
    ) -> None:
        if multi_image not in (None, "all", "first"):
            raise ValueError(f"multi_image must be 'all', 'first' or None, got {multi_image!r}")
        if empty not in ("error", "reference"):
            raise ValueError(f"empty must be 'error' or 'reference', got {empty!r}")
        self.tokenizer = tokenizer
        self.config = config
        self.multi_image = multi_image
        self.text_only_image = text_only_image
        self.empty = empty
        self.max_image_pixels = max_image_pixels
        self.template = PromptTemplate(tokenizer)
        self._tokens = PromptTokenizer(tokenizer, self.template)
        self._table = normalise_table(config)
        self._settings = repr(config).encode()

        blank = Image.new("RGB", (28, 28), (255, 255, 255))
        visual = self._plan_visual((blank,), ("the blank image",), ((28, 28),), False)
        pixels, grid = self._load_visual(visual, {})
        self._blank_visual = visual
        self._blank_pixels = torch.from_numpy(pixels)
        self._blank_grid = torch.tensor([grid], dtype=torch.int64, device="cpu")

    def plan(
        self,
        items: Sequence[Item | Mapping[str, Any]],
        on_error: Literal["raise", "skip"] = "raise",
        *,
        base_dir: str | Path | None = None,
        start_index: int = 0,
    ) -> list[PlannedItem]:
        """Check, tokenise, measure and hash items without decoding an image.

        Files are read once, for their header and content hash; the same file or object in
        several items is read once per call.

        Args:
            items: mappings or :class:`Item` objects, see :func:`parse_item`.
            on_error: ``"raise"`` the first error, or ``"skip"``: give the item's plan the error
                and go on.
            base_dir: directory that relative media paths are relative to.
            start_index: index of the first item, for callers that plan in pieces.

        Returns:
            One plan per item, in order.

        Raises:
            ItemError: for the first bad item, with ``on_error="raise"``.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if isinstance(items, (str, bytes, Mapping, Item)):
            raise TypeError("items must be a sequence of items; put a single item into a list")
        headers = _HeaderCache(self.max_image_pixels)
        drafts: list[_Draft | PlannedItem] = []
        for index, raw in enumerate(items, start=start_index):
            try:
                drafts.append(self._draft(raw, index, base_dir, headers))
            except ItemError as error:
                if on_error == "raise":
                    raise
                drafts.append(PlannedItem(index, error.id or str(index), error=error))

        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        token_ids = self._tokens.encode(draft.prompt for draft in good)
        return [
            self._finish(draft, token_ids[draft.prompt]) if isinstance(draft, _Draft) else draft
            for draft in drafts
        ]

    def load(self, planned: PlannedItem) -> PreparedItem:
        """Decode, resize and cut an item's media; thread-safe.

        Raises:
            ItemError: the plan's own error; or media that do not decode, or that have changed
                since they were planned.
        """
        if planned.error is not None:
            raise planned.error
        if planned.token_ids is None:
            raise ValueError("planned item has no token ids; make it with Processor.plan")
        decoded: dict[int | str, ByteArray] = {}
        parts: list[FloatArray] = []
        grids: list[Grid] = []
        try:
            for visual in planned.visuals:
                pixels, grid = self._load_visual(visual, decoded)
                parts.append(pixels)
                grids.append(grid)
        except ItemError as error:
            raise ItemError(error.reason, planned.index, planned.id) from error

        pixel_values: torch.Tensor | None = None
        grid_thw: torch.Tensor | None = None
        if planned.header == "text":
            pixel_values, grid_thw = self._blank_pixels, self._blank_grid
            grids = [self._blank_visual.grid]
        elif parts:
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            pixel_values = torch.from_numpy(joined)
            grid_thw = torch.tensor(grids, dtype=torch.int64, device="cpu")

        is_video = planned.kind == "video"
        return PreparedItem(
            index=planned.index,
            id=planned.id,
            digest=planned.digest,
            input_ids=self._expand(planned.token_ids, "video" if is_video else "image", grids),
            pixel_values=None if is_video else pixel_values,
            image_grid_thw=None if is_video else grid_thw,
            pixel_values_videos=pixel_values if is_video else None,
            video_grid_thw=grid_thw if is_video else None,
            header=planned.header,
        )

    @property
    def blank_image(self) -> tuple[torch.Tensor, Grid]:
        """Patches and grid of the white image that stands before text-only prompts."""
        return self._blank_pixels, self._blank_visual.grid

    # Planning ------------------------------------------------------------------------------

    def _draft(
        self,
        raw: Item | Mapping[str, Any],
        index: int,
        base_dir: str | Path | None,
        headers: _HeaderCache,
    ) -> _Draft:
        item = parse_item(raw, index, base_dir, allow_empty=self.empty == "reference")
        try:
            sources, kind, through_jpeg = self._choose_media(item)
            prompt, header = self._prompt(item, kind, len(sources))
            visuals, digests = self._plan_media(sources, kind, through_jpeg, headers)
        except ItemError as error:
            raise ItemError(error.reason, index, item.id) from error
        state = hashlib.blake2b(self._settings, digest_size=20)
        for part in (
            self.template.render(*prompt).encode(),
            b"jpeg" if through_jpeg else b"",
            *digests,
        ):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return _Draft(index, item.id, kind, header, prompt, visuals, state.hexdigest())

    def _choose_media(self, item: Item) -> tuple[tuple[MediaSource, ...], ItemKind, bool]:
        if item.video is not None:
            return item.video, "video", False
        if len(item.images) < 2:
            return item.images, "image" if item.images else "text", False
        if self.multi_image is None:
            raise ItemError(
                f"has {len(item.images)} images; choose multi_image='all' (embed every image) or "
                "multi_image='first' (only the first one, as the official evaluation does)"
            )
        if self.multi_image == "first":
            return item.images[:1], "image", True
        return item.images, "image", False

    def _prompt(
        self, item: Item, kind: ItemKind, num_sources: int
    ) -> tuple[Prompt, Literal["text"] | None]:
        if item.is_empty:
            return ((), EMPTY_TEXT), None
        text = clean_text(join_text(item.instruction, item.text))
        if kind == "video":
            return (("video",), text), None
        if kind == "image":
            images: Layout = tuple("image" for _ in range(num_sources))
            return (images, text), None
        if not text and self.empty == "error":
            raise ItemError("has no text left once visual placeholders and white space are removed")
        if self.text_only_image:
            return (("image",), text), "text"
        return ((), text), None

    def _plan_media(
        self,
        sources: tuple[MediaSource, ...],
        kind: ItemKind,
        through_jpeg: bool,
        headers: _HeaderCache,
    ) -> tuple[tuple[VisualPlan, ...], list[bytes]]:
        labels = tuple(
            f"video frame {i} ({media.describe(s)})"
            if kind == "video"
            else f"image {media.describe(s)}"
            for i, s in enumerate(sources)
        )
        found = [headers.read(s, label) for s, label in zip(sources, labels, strict=True)]
        sizes = tuple((h.height, h.width) for h in found)
        digests = [h.digest for h in found]
        if kind == "video":
            return (self._plan_visual(sources, labels, sizes, False),), digests
        return (
            tuple(
                self._plan_visual((source,), (label,), (size,), through_jpeg)
                for source, label, size in zip(sources, labels, sizes, strict=True)
            ),
            digests,
        )

    def _plan_visual(
        self,
        sources: tuple[MediaSource, ...],
        labels: tuple[str, ...],
        sizes: tuple[tuple[int, int], ...],
        through_jpeg: bool,
    ) -> VisualPlan:
        config = self.config
        fetched = [self._fetch_size(size, label) for size, label in zip(sizes, labels, strict=True)]
        for size, label in zip(fetched, labels, strict=True):
            if size != fetched[0]:
                # transformers stacks the frames after the fetch stage and fails there as well
                raise ItemError(
                    f"{label} has another size than the first frame ({size[1]}x{size[0]}, not "
                    f"{fetched[0][1]}x{fetched[0][0]}); crop or resize the frames to one size"
                )
        with _labelled(labels[0]):
            size = model_size(*fetched[0], config.factor, config.min_pixels, config.max_pixels)
        depth = config.temporal_patch_size
        grid = (
            -(-len(sources) // depth),
            size[0] // config.patch_size,
            size[1] // config.patch_size,
        )
        fetch = None if config.fetch_min_pixels is None else fetched[0]
        return VisualPlan(sources, labels, sizes, fetch, size, grid, through_jpeg)

    def _fetch_size(self, size: tuple[int, int], label: str) -> tuple[int, int]:
        config = self.config
        if config.fetch_min_pixels is None:
            return size
        with _labelled(label):
            return fetch_size(
                *size, config.factor, config.fetch_min_pixels, config.fetch_max_pixels
            )

    def _finish(self, draft: _Draft, token_ids: npt.NDArray[np.int32]) -> PlannedItem:
        visuals = draft.visuals
        shown = (self._blank_visual,) if draft.header == "text" else visuals
        pad: MediaKind = "video" if draft.kind == "video" else "image"
        found = int(np.count_nonzero(token_ids == self.template.pad_ids[pad]))
        if found != len(shown):
            raise CheckpointError(
                f"the tokenizer splits the visual tokens: {found} pads for {len(shown)} visual "
                "blocks; use the tokenizer files that belong to the checkpoint"
            )
        num_patches = sum(visual.num_patches for visual in shown)
        return PlannedItem(
            index=draft.index,
            id=draft.id,
            digest=draft.digest,
            num_tokens=len(token_ids) - len(shown) + num_patches // self.config.merge_size**2,
            num_patches=num_patches,
            kind=draft.kind,
            header=draft.header,
            token_ids=token_ids,
            visuals=visuals,
        )

    # Loading -------------------------------------------------------------------------------

    def _load_visual(
        self, visual: VisualPlan, decoded: dict[int | str, ByteArray]
    ) -> tuple[FloatArray, Grid]:
        frames = []
        for source, label, size in zip(
            visual.sources, visual.labels, visual.source_sizes, strict=True
        ):
            key = id(source) if isinstance(source, (bytes, Image.Image)) else str(source)
            if key not in decoded:
                with _labelled(label):
                    decoded[key] = self._load_frame(source, visual, size)
            frames.append(decoded[key])
        return make_patches(frames, self.config, self._table)

    def _load_frame(
        self, source: MediaSource, visual: VisualPlan, size: tuple[int, int]
    ) -> ByteArray:
        image = media.decode_rgb(source, self.max_image_pixels, through_jpeg=visual.through_jpeg)
        if (image.height, image.width) != size:
            raise ItemError("has changed since it was planned; plan the item again")
        if visual.fetch_size is not None:
            image = resize(image, *visual.fetch_size)
        return np.asarray(resize(image, *visual.size))

    def _expand(
        self, token_ids: npt.NDArray[np.int32], kind: MediaKind, grids: Sequence[Grid]
    ) -> torch.Tensor:
        counts = np.ones(len(token_ids), dtype=np.int64)
        counts[token_ids == self.template.pad_ids[kind]] = [
            t * h * w // self.config.merge_size**2 for t, h, w in grids
        ]
        return torch.from_numpy(np.repeat(token_ids.astype(np.int64), counts))


@dataclass(frozen=True)
class _Draft:
    index: int
    id: str
    kind: ItemKind
    header: Literal["text"] | None
    prompt: Prompt
    visuals: tuple[VisualPlan, ...]
    digest: str


class _labelled:
    """Puts the name of the image in front of the reason of an error about it."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> Literal[False]:
        if isinstance(error, ItemError):
            raise ItemError(f"{self._label} {error.reason}") from error
        return False


class _HeaderCache:
    """Reads each distinct file or object once per call of ``plan``."""

    def __init__(self, max_image_pixels: int) -> None:
        self._max_image_pixels = max_image_pixels
        # The source is kept with its header: an object's id is unique only while it lives.
        self._found: dict[object, tuple[MediaSource, media.MediaHeader]] = {}

    def read(self, source: MediaSource, label: str) -> media.MediaHeader:
        key: object = media.file_key(source) if isinstance(source, (str, Path)) else id(source)
        if key is not None and key in self._found:
            return self._found[key][1]
        with _labelled(label):
            header = media.read_header(source, self._max_image_pixels)
        if key is not None:
            self._found[key] = (source, header)
        return header
