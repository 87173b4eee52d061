"""From RGB pixels to the flattened patches a Qwen2-VL vision tower takes.

The values are those of transformers' Pillow-based image processor bit for bit: a pixel has only
256 values per channel, so rescaling and normalising become one look-up in a table that is
computed with that processor's own operations and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ume_models.processing.config import ImageConfig

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Pillow bicubic resize; the image itself if it already has that size."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), resample=Image.Resampling.BICUBIC)


def resize_smoothly(frame: Image.Image, height: int, width: int) -> ByteArray:
    """torchvision's antialiased bicubic resize of uint8 pixels, bit for bit; ``[H, W, 3]``.

    It computes in float32 and rounds at the end. (PyTorch's own resize of uint8, like Pillow's,
    works in integers and differs by up to three grey levels.)
    """
    values = torch.from_numpy(np.asarray(frame, dtype=np.float32)).permute(2, 0, 1)[None]
    values = torch.nn.functional.interpolate(
        values, size=(height, width), mode="bicubic", antialias=True
    )
    rounded = values.clamp_(0, 255).round_().to(torch.uint8)
    resized: ByteArray = rounded[0].permute(1, 2, 0).numpy()
    return resized


def normalise_table(config: ImageConfig) -> FloatArray:
    """Table ``[3, 256]`` of ``(float32(value · rescale) − mean) / std`` per channel.

    The product is taken in float64 and rounded to float32, then the rest is float32: the order
    and dtypes of transformers' ``rescale`` and ``normalize``.
    """
    rescaled = (np.arange(256).astype(np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.image_mean, dtype=np.float32)[:, None]
    std = np.array(config.image_std, dtype=np.float32)[:, None]
    table: FloatArray = (rescaled[None, :] - mean) / std
    return table


def make_patches(
    frames: Sequence[ByteArray], config: ImageConfig, table: FloatArray
) -> tuple[FloatArray, tuple[int, int, int]]:
    """Cut frames of one size into flattened, normalised patches.

    Args:
        frames: uint8 ``[H, W, 3]`` each, sides divisible by ``config.factor``. One frame is a
            still image. If their number is no multiple of ``temporal_patch_size``, the last one
            is repeated.
        config: geometry.
        table: from :func:`normalise_table`.

    Returns:
        float32 ``[t·h·w, 3·T·p·p]`` with the patches of a merge window side by side, and the
        grid ``(t, h, w)`` in patches.
    """
    patch, merge, depth = config.patch_size, config.merge_size, config.temporal_patch_size
    height, width, _ = frames[0].shape
    grid_h, grid_w = height // patch, width // patch
    grid_t = -(-len(frames) // depth)
    windows_h, windows_w = grid_h // merge, grid_w // merge

    out = np.empty(
        (grid_t, windows_h, windows_w, merge, merge, 3, depth, patch, patch), dtype=np.float32
    )
    # One row of windows at a time, so that the intermediate steps stay in the processor's cache.
    row = (windows_w, merge, merge, 3, patch, patch)
    pixels = np.empty(row, dtype=np.uint8)
    index = np.empty(row, dtype=np.intp)
    values = np.empty(row, dtype=np.float32)
    channel_start = np.array([0, 256, 512], dtype=np.intp)[:, None, None]
    flat_table = table.reshape(-1)
    for position, frame in enumerate(frames):
        windows = frame.reshape(windows_h, merge, patch, windows_w, merge, patch, 3).transpose(
            0, 3, 1, 4, 6, 2, 5
        )
        t, first_slot = divmod(position, depth)
        # the last frame also fills what is left of its patch in time
        slots = range(first_slot, depth if position == len(frames) - 1 else first_slot + 1)
        for y in range(windows_h):
            np.copyto(pixels, windows[y])
            np.add(pixels, channel_start, out=index)
            # mode="clip" spares a bounds check which cannot fail here
            np.take(flat_table, index, out=values, mode="clip")
            for slot in slots:
                out[t, y, ..., slot, :, :] = values
    return out.reshape(grid_t * grid_h * grid_w, config.patch_dim), (grid_t, grid_h, grid_w)
