"""A padded batch in Hugging Face processor layout, taken apart into rows."""

from __future__ import annotations

import numpy as np
import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.rollout.sequence import Visual

Media = tuple[torch.Tensor | None, torch.Tensor | None]

MEDIA_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
PROCESSOR_INPUTS = ("input_ids", "attention_mask", *MEDIA_INPUTS)
"""Names of what a Hugging Face processor of the family makes."""


class _Feed:
    """Images (or videos) of a batch, dealt out row by row."""

    def __init__(self, kind: str, media: Media, config: BackboneConfig) -> None:
        pixels, grids = media
        self.kind = kind
        if (pixels is None) != (grids is None):
            raise ValueError(f"give {kind} patches and {kind} grids together")
        self.merge = config.vision.merge_size**2
        self.grids: list[tuple[int, int, int]] = []
        self.pixels = torch.empty(0, config.vision.patch_dim, device="cpu")
        if pixels is not None and grids is not None:
            if pixels.ndim != 2 or pixels.shape[1] != config.vision.patch_dim:
                raise ValueError(
                    f"{kind} patches must be [P, {config.vision.patch_dim}], "
                    f"got {tuple(pixels.shape)}"
                )
            if grids.ndim != 2 or grids.shape[1] != 3:
                raise ValueError(f"{kind} grids must be [n, 3], got {tuple(grids.shape)}")
            self.pixels = pixels
            self.grids = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
        side = config.vision.merge_size
        for number, (t, h, w) in enumerate(self.grids):
            if min(t, h, w) < 1 or h % side or w % side:
                raise ValueError(
                    f"{kind} {number}: grid {(t, h, w)} is not divisible by the merge size {side}"
                )
        total = sum(t * h * w for t, h, w in self.grids)
        if total != self.pixels.shape[0]:
            raise ValueError(
                f"{kind} grids describe {total} patches, but {self.pixels.shape[0]} were given"
            )
        self.next_grid = self.next_patch = 0

    def take(self, tokens: int, row: int) -> list[Visual]:
        """Visuals that fill ``tokens`` merged tokens of a row."""
        taken = []
        while tokens > 0:
            if self.next_grid == len(self.grids):
                raise ValueError(f"row {row} has {self.kind} tokens but no {self.kind} is left")
            grid = self.grids[self.next_grid]
            patches = grid[0] * grid[1] * grid[2]
            tokens -= patches // self.merge
            end = self.next_patch + patches
            taken.append(Visual(self.pixels[self.next_patch : end], grid, self.kind == "video"))
            self.next_grid, self.next_patch = self.next_grid + 1, end
        if tokens < 0:
            raise ValueError(
                f"row {row}: {self.kind} tokens do not match the grids ({-tokens} too few); was "
                "the prompt truncated?"
            )
        return taken

    def finish(self) -> None:
        """Raise ValueError if something was not used."""
        left = len(self.grids) - self.next_grid
        if left:
            raise ValueError(f"{left} of {len(self.grids)} {self.kind}s have no tokens in any row")


def rows_of_batch(
    config: BackboneConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    images: Media,
    videos: Media,
) -> list[tuple[np.ndarray, list[Visual]]]:
    """Unpadded ids and visuals of every row.

    Args:
        config: pad ids, merge size, vocabulary.
        input_ids: ``[B, N]`` integers.
        attention_mask: ``[B, N]``, non-zero for real tokens, or None for all.
        images, videos: (patches, grids) of the whole batch.

    Raises:
        ValueError: something does not fit; names the row.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids must be a tensor [B, N], got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [B, N], got {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    ids = input_ids.cpu().numpy().astype(np.int64)
    keep = (
        np.ones_like(ids, dtype=bool)
        if attention_mask is None
        else attention_mask.cpu().numpy() != 0
    )
    image_feed, video_feed = _Feed("image", images, config), _Feed("video", videos, config)
    rows = []
    for row in range(ids.shape[0]):
        real = ids[row][keep[row]]
        if not real.size:
            raise ValueError(f"row {row} has no tokens (its attention_mask is all zero)")
        if real.min() < 0 or real.max() >= config.vocab_size:
            raise ValueError(f"row {row} has token ids outside 0 … {config.vocab_size - 1}")
        visuals = image_feed.take(int((real == config.image_token_id).sum()), row)
        visuals += video_feed.take(int((real == config.video_token_id).sum()), row)
        rows.append((real, visuals))
    image_feed.finish()
    video_feed.finish()
    return rows
