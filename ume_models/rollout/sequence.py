"""What the engine takes: one unpadded prompt with its visual patches."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.mrope import mrope_position_ids

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Visual:
    """Patches ``[p, C·T·p·p]`` of one image or video and their (t, h, w) grid."""

    patches: torch.Tensor
    grid: Grid
    is_video: bool = False


@dataclass(frozen=True)
class Sequence:
    """One row of a batch.

    Attributes:
        input_ids: int64 ``[n]`` token ids with one pad id per merged visual token.
        positions: int64 ``[3, n]`` M-RoPE positions.
        visuals: every image and video, in the order of their tokens.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    visuals: tuple[Visual, ...] = ()

    def __len__(self) -> int:
        return int(self.input_ids.size)


def build_sequence(
    input_ids: np.ndarray, config: BackboneConfig, visuals: Seq[Visual] = ()
) -> Sequence:
    """Order visuals by their tokens and compute the positions.

    Args:
        input_ids: int64 ``[n]``, unpadded.
        config: names the pad ids.
        visuals: images in order and videos in order; how the two interleave is read from the
            tokens.

    Raises:
        ValueError: visual tokens and grids do not match, or patches and grid disagree.
    """
    images = [v for v in visuals if not v.is_video]
    videos = [v for v in visuals if v.is_video]
    for visual in visuals:
        t, h, w = visual.grid
        if visual.patches.shape[0] != t * h * w:
            raise ValueError(f"{visual.patches.shape[0]} patches for a {t}x{h}x{w} grid")
    positions = mrope_position_ids(
        input_ids, config, [v.grid for v in images], [v.grid for v in videos]
    )
    ordered: list[Visual] = list(images or videos)
    if images and videos:
        ordered, at = [], 0
        kinds = input_ids[np.isin(input_ids, (config.image_token_id, config.video_token_id))]
        queues = {config.image_token_id: iter(images), config.video_token_id: iter(videos)}
        while at < kinds.size:
            visual = next(queues[int(kinds[at])])
            ordered.append(visual)
            at += visual.patches.shape[0] // config.vision.merge_size**2
    return Sequence(input_ids, positions, tuple(ordered))


def visual_spans(sequence: Sequence, config: BackboneConfig) -> list[tuple[int, int]]:
    """First token and end of each visual of a prompt."""
    pads = np.flatnonzero(
        np.isin(sequence.input_ids, (config.image_token_id, config.video_token_id))
    )
    spans, at = [], 0
    for visual in sequence.visuals:
        tokens = visual.patches.shape[0] // config.vision.merge_size**2
        spans.append((int(pads[at]), int(pads[at + tokens - 1]) + 1))
        at += tokens
    return spans


def beginning(sequence: Sequence, count: int, config: BackboneConfig) -> Sequence:
    """The first ``count`` tokens, fewer where that would cut a visual in two."""
    if count >= len(sequence):
        return sequence
    visuals: list[Visual] = []
    for visual, (start, end) in zip(sequence.visuals, visual_spans(sequence, config), strict=True):
        if end > count:
            count = min(count, start)
            break
        visuals.append(visual)
    return Sequence(sequence.input_ids[:count], sequence.positions[:, :count], tuple(visuals))
