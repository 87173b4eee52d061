"""M-RoPE position index of a prompt, as the official code (transformers 4.52) computes it.

Text advances all three axes together. A vision block of merged extent (t, h, w) that starts
at position s takes s + (t, h, w) indices, and the text after it continues at the largest
position on *any* axis + 1. transformers 5 continues at s + max(h, w) instead and so gives
other embeddings for videos with more temporal slices than rows or columns; hence we compute
the index ourselves under every version.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ume_models.backbone.config import BackboneConfig

Grid = tuple[int, int, int]


def _vision_block(grid: Grid, merge: int, time_step: float) -> np.ndarray:
    """Indices ``[3, t·h·w/merge²]`` of one block that starts at 0."""
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    index = np.empty((3, t, h, w), dtype=np.int64)
    index[0] = (np.arange(t) * time_step).astype(np.int64)[:, None, None]
    index[1] = np.arange(h)[:, None]
    index[2] = np.arange(w)
    return index.reshape(3, -1)


def mrope_position_ids(
    input_ids: Sequence[int] | np.ndarray | torch.Tensor,
    config: BackboneConfig,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
) -> np.ndarray:
    """Position index of one unpadded sequence.

    Args:
        input_ids: ``[n]`` ids with one pad id per merged visual token.
        config: names the image and video pad ids and the merge size.
        image_grids, video_grids: (t, h, w) in patches per image / video, in order.

    Qwen2.5-VL spaces the slices of a video by ``tokens_per_second`` (one second a slice).

    Returns:
        int64 ``[3, n]``: temporal, height and width positions.

    Raises:
        ValueError: the pad tokens do not match the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    merge = config.vision.merge_size
    images, videos = list(image_grids), list(video_grids)
    is_visual = (ids == config.image_token_id) | (ids == config.video_token_id)
    out = np.empty((3, ids.size), dtype=np.int64)
    at, start, n_image, n_video = 0, 0, 0, 0
    while at < ids.size:
        if not is_visual[at]:
            rest = np.flatnonzero(is_visual[at:])
            end = at + (int(rest[0]) if rest.size else ids.size - at)
            out[:, at:end] = start + np.arange(end - at)
            start += end - at
            at = end
            continue
        time_step = 1.0
        if ids[at] == config.image_token_id:
            if n_image == len(images):
                raise ValueError(f"image tokens for more than the {n_image} images given")
            grid, n_image = images[n_image], n_image + 1
        else:
            if n_video == len(videos):
                raise ValueError(f"video tokens for more than the {n_video} videos given")
            if config.family == "qwen2_5_vl":
                time_step = config.vision.tokens_per_second
            grid, n_video = videos[n_video], n_video + 1
        block = _vision_block(grid, merge, time_step)
        end = at + block.shape[1]
        if end > ids.size or not (ids[at:end] == ids[at]).all():
            raise ValueError(
                f"a {grid} grid needs {block.shape[1]} visual tokens, but fewer follow token {at}"
            )
        out[:, at:end] = start + block
        start += int(block.max()) + 1
        at = end
    if n_image != len(images) or n_video != len(videos):
        raise ValueError(
            f"{len(images)} images and {len(videos)} videos given, but tokens for "
            f"{n_image} and {n_video}"
        )
    return out


def mrope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, section: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables ``[n, dh]`` for ``[3, n]`` positions.

    Frequency band i of each half takes its angle from the axis that owns it: the first
    ``section[0]`` bands from time, then height, then width.
    """
    angles = positions[..., None].float() * inv_freq
    bands = torch.split(angles, list(section), dim=-1)
    half = torch.cat([band[axis] for axis, band in enumerate(bands)], dim=-1)
    full = torch.cat([half, half], dim=-1)
    return full.cos().to(dtype), full.sin().to(dtype)
