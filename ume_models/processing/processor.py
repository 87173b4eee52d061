"""Items to model inputs: a cheap plan for all of them, then full decoding one by one."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ume_models.errors import CheckpointError, ErrorKind, ItemError, OptionError
from ume_models.processing import media
from ume_models.processing.config import ImageConfig
from ume_models.processing.items import Item, MediaSource, parse_item
from ume_models.processing.patches import FloatArray
from ume_models.processing.rules import MediaRules
from ume_models.processing.template import (
    IMAGE_PAD,
    VIDEO_PAD,
    Layout,
    MediaKind,
    Rendered,
    Template,
    sample_prompts,
)
from ume_models.processing.tokens import PromptTokenizer
from ume_models.processing.visuals import (
    Decoded,
    Grid,
    VisualPlan,
    VisualProcessor,
    labelled,
)

ItemKind: TypeAlias = Literal["text", "image", "video"]


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
    convention: str = ""


class Processor:
    """Turns items into model inputs exactly as an official evaluation does.

    Args:
        tokenizer: the checkpoint's tokenizer.
        template: the convention of prompts.
        config: image geometry.
        rules: the conventions of pixels, within the checkpoint's limits (``for_checkpoint``).
        empty: ``"error"``, or ``"reference"`` to embed an item without any content as official
            evaluations do (two spaces, no image).
        max_image_pixels: larger images are refused unread (decompression bombs).
        max_tokens: texts that cannot have so few are refused before they are tokenised.

    ``load`` may run in several threads.

    Raises:
        CheckpointError: the tokenizer lacks one of the template's tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        config: ImageConfig,
        rules: MediaRules,
        *,
        empty: Literal["error", "reference"] = "error",
        max_image_pixels: int = media.DEFAULT_MAX_IMAGE_PIXELS,
        max_tokens: int | None = None,
    ) -> None:
        if empty not in ("error", "reference"):
            raise OptionError(f"empty must be 'error' or 'reference', got {empty!r}")
        self.tokenizer = tokenizer
        self.template = template
        self.config = config
        self.rules = rules
        self.empty = empty
        self.max_tokens = max_tokens
        self._warned: set[str] = set()
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in (IMAGE_PAD, VIDEO_PAD, *template.tokens) if t not in vocabulary]
        if missing:
            raise CheckpointError(
                f"the tokenizer lacks {', '.join(missing)}; use the tokenizer files that belong "
                "to the checkpoint, not those of its base model"
            )
        self.pad_ids: dict[MediaKind, int] = {
            "image": vocabulary[IMAGE_PAD],
            "video": vocabulary[VIDEO_PAD],
        }
        self._tokens = PromptTokenizer(tokenizer)
        self._visuals = VisualProcessor(config, rules, max_image_pixels)
        self._settings = repr((config, rules)).encode()

        blank = Image.new("RGB", (28, 28), (255, 255, 255))
        self._blank_visual = self._visuals.plan((blank,), ("the blank image",), ((28, 28),))
        pixels, grid = self._visuals.load(self._blank_visual, {})
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
            raise OptionError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if isinstance(items, (str, bytes, Mapping, Item)):
            raise TypeError("items must be a sequence of items; put a single item into a list")
        headers = _HeaderCache(self._visuals)
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
        plans = [
            self._finish(draft, token_ids[draft.prompt]) if isinstance(draft, _Draft) else draft
            for draft in drafts
        ]
        for plan in plans:
            if plan.error is not None and on_error == "raise":
                raise plan.error
        return plans

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
        decoded: Decoded = {}
        parts: list[FloatArray] = []
        grids: list[Grid] = []
        try:
            for visual in planned.visuals:
                pixels, grid = self._visuals.load(visual, decoded)
                parts.append(pixels)
                grids.append(grid)
        except ItemError as error:
            raise error.at(planned.index, planned.id) from error

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
            convention=self.convention,
        )

    @cached_property
    def convention(self) -> str:
        """Hash of everything that determines what an item becomes, prompts included."""
        about = [self.described(), sample_prompts(self.template)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def described(self) -> dict[str, Any]:
        """Everything beside prompts that determines inputs; JSON-serialisable.

        Conventions that are those of the time before profiles are left out, but for the ones that
        were already written then, so that what was stored stays comparable.
        """
        always = ("min_pixels", "max_pixels", "fetch_min_pixels", "fetch_max_pixels")
        rules, before = asdict(self.rules), asdict(MediaRules())
        geometry = asdict(self.config)
        del geometry["stored_max_pixels"]
        multi_image = rules.pop("multi_image")
        return {
            "multi_image": multi_image,
            "text_only_image": self.template.blank_image,
            "empty": self.empty,
            "images": {
                **geometry,
                **{k: v for k, v in rules.items() if k in always or v != before[k]},
            },
        }

    @property
    def max_image_pixels(self) -> int:
        """Larger images are refused unread; may be set."""
        return self._visuals.max_image_pixels

    @max_image_pixels.setter
    def max_image_pixels(self, pixels: int) -> None:
        self._visuals.max_image_pixels = pixels

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
            self._check_length(prompt)
            labels = _labels(sources, kind)
            found = [headers.read(s, label) for s, label in zip(sources, labels, strict=True)]
            visuals = self._plan_media(sources, labels, found, kind, through_jpeg)
        except ItemError as error:
            raise error.at(index, item.id) from error
        if self.rules.pictures == "official":
            self._warn(labels, found, index, item.id)
        digests = [header.digest for header in found]
        state = hashlib.blake2b(self._settings, digest_size=20)
        for part in (str(prompt).encode(), b"jpeg" if through_jpeg else b"", *digests):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return _Draft(index, item.id, kind, header, prompt, visuals, state.hexdigest())

    def _choose_media(self, item: Item) -> tuple[tuple[MediaSource, ...], ItemKind, bool]:
        """What is looked at of an item's media, as what, and whether through JPEG."""
        rules, images = self.rules, item.images
        if item.video is not None:
            if rules.clips == "refuse":
                raise ItemError("is a video, which this model does not take; embed its frames")
            frames = tuple(item.video[at] for at in rules.frame_positions(len(item.video)))
            return frames, "image" if rules.clips == "middle" else "video", False
        if len(images) < 2:
            return images, "image" if images else "text", False
        if rules.multi_image is None:
            raise ItemError(
                f"has {len(images)} images; choose multi_image='all' (embed every image) or "
                "multi_image='first' (only the first one, as the official evaluation does)",
                kind=ErrorKind.NEEDS_CHOICE,
            )
        if rules.multi_image == "refuse":
            raise ItemError(
                f"has {len(images)} images, and this model takes one; embed them as several items"
            )
        if rules.multi_image == "first":
            return images[:1], "image", True
        if rules.multi_image == "middle":
            return (images[len(images) // 2],), "image", False
        return images, "image", False

    def _prompt(
        self, item: Item, kind: ItemKind, num_sources: int
    ) -> tuple[Rendered, Literal["text"] | None]:
        header: Literal["text"] | None = None
        layout: Layout = ()
        if item.video is not None:
            layout = ("video",)
        elif kind == "image":
            layout = tuple("image" for _ in range(num_sources))
        elif self.template.blank_image and not item.is_empty:
            layout, header = ("image",), "text"
        prompt = self.template.render(layout, item.instruction, item.text)
        if kind == "text" and self.empty == "error" and not prompt.text.strip():
            raise ItemError("has no text left once visual placeholders and white space are removed")
        return prompt, header

    def _check_length(self, prompt: Rendered) -> None:
        limits = [limit for limit in (self.max_tokens, prompt.limit) if limit is not None]
        if limits and self._tokens.exceeds(prompt.text, min(limits)):
            raise ItemError(
                f"the text has {len(prompt.text)} characters, which cannot be {min(limits)} tokens "
                "or fewer; shorten it",
                kind=ErrorKind.TOO_LONG,
            )

    def _warn(
        self, labels: Sequence[str], found: Sequence[media.MediaHeader], index: int, id: str
    ) -> None:
        """Name the first item of each kind that a viewer shows otherwise."""
        for label, header in zip(labels, found, strict=True):
            for unlike in header.unlike:
                if unlike not in self._warned:
                    self._warned.add(unlike)
                    about = f"{label} {unlike}, as official codes have it; pictures='as_seen' "
                    about += "embeds what a viewer shows (later ones like it are not named)"
                    warnings.warn(str(ItemError(about, index, id)), stacklevel=2)

    def _plan_media(
        self,
        sources: tuple[MediaSource, ...],
        labels: tuple[str, ...],
        found: Sequence[media.MediaHeader],
        kind: ItemKind,
        through_jpeg: bool,
    ) -> tuple[VisualPlan, ...]:
        sizes = tuple((header.height, header.width) for header in found)
        if kind == "video":
            return (self._visuals.plan(sources, labels, sizes, clip=True),)
        return tuple(
            self._visuals.plan((source,), (label,), (size,), through_jpeg=through_jpeg)
            for source, label, size in zip(sources, labels, sizes, strict=True)
        )

    def _finish(self, draft: _Draft, token_ids: npt.NDArray[np.int32]) -> PlannedItem:
        visuals = draft.visuals
        shown = (self._blank_visual,) if draft.header == "text" else visuals
        pad: MediaKind = "video" if draft.kind == "video" else "image"
        found = int(np.count_nonzero(token_ids == self.pad_ids[pad]))
        if found != len(shown):
            raise CheckpointError(
                f"the tokenizer splits the visual tokens: {found} pads for {len(shown)} visual "
                "blocks; use the tokenizer files that belong to the checkpoint"
            )
        num_patches = sum(visual.num_patches for visual in shown)
        num_tokens = len(token_ids) - len(shown) + num_patches // self.config.merge_size**2
        limit = draft.prompt.limit
        if limit is not None and num_tokens > limit:
            reason = (
                f"the prompt has {num_tokens} tokens, and the official code cuts it at {limit}, "
                "which loses the token that the embedding is read at; shorten the text"
            )
            error = ItemError(reason, draft.index, draft.id, kind=ErrorKind.TOO_LONG)
            return PlannedItem(draft.index, draft.id, error=error)
        return PlannedItem(
            index=draft.index,
            id=draft.id,
            digest=draft.digest,
            num_tokens=num_tokens,
            num_patches=num_patches,
            kind=draft.kind,
            header=draft.header,
            token_ids=token_ids,
            visuals=visuals,
        )

    # Loading -------------------------------------------------------------------------------

    def _expand(
        self, token_ids: npt.NDArray[np.int32], kind: MediaKind, grids: Sequence[Grid]
    ) -> torch.Tensor:
        counts = np.ones(len(token_ids), dtype=np.int64)
        counts[token_ids == self.pad_ids[kind]] = [
            t * h * w // self.config.merge_size**2 for t, h, w in grids
        ]
        return torch.from_numpy(np.repeat(token_ids.astype(np.int64), counts))


def _labels(sources: Sequence[MediaSource], kind: ItemKind) -> tuple[str, ...]:
    return tuple(
        f"video frame {i} ({media.describe(s)})"
        if kind == "video"
        else f"image {media.describe(s)}"
        for i, s in enumerate(sources)
    )


@dataclass(frozen=True)
class _Draft:
    index: int
    id: str
    kind: ItemKind
    header: Literal["text"] | None
    prompt: Rendered
    visuals: tuple[VisualPlan, ...]
    digest: str


class _HeaderCache:
    """Reads each distinct file or object once per call of ``plan``."""

    def __init__(self, visuals: VisualProcessor) -> None:
        self._visuals = visuals
        # The source is kept with its header: an object's id is unique only while it lives.
        self._found: dict[object, tuple[MediaSource, media.MediaHeader]] = {}

    def read(self, source: MediaSource, label: str) -> media.MediaHeader:
        key: object = media.file_key(source) if isinstance(source, (str, Path)) else id(source)
        if key is not None and key in self._found:
            return self._found[key][1]
        with labelled(label):
            header = self._visuals.header(source)
        if key is not None:
            self._found[key] = (source, header)
        return header
