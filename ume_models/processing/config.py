"""Image geometry and normalisation, read from a checkpoint's ``preprocessor_config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ume_models.errors import CheckpointError

OFFICIAL_MIN_PIXELS = 784
OFFICIAL_MAX_PIXELS = 2_359_296
FETCH_MIN_PIXELS = 4 * 28 * 28
FETCH_MAX_PIXELS = 16384 * 28 * 28
_BICUBIC = 3


@dataclass(frozen=True)
class ImageConfig:
    """How pixels become patches. Images and video frames share these settings.

    Attributes:
        patch_size: side of a vision patch in pixels.
        merge_size: patches per side which the vision tower merges into one token.
        temporal_patch_size: frames per patch.
        image_mean: per-channel mean, after rescaling.
        image_std: per-channel standard deviation, after rescaling.
        rescale_factor: multiplies the 8-bit values first.
        min_pixels: smallest area after the model-stage resize (official evaluation: 784).
        max_pixels: largest area after the model-stage resize (official evaluation: 2359296).
        fetch_min_pixels: smallest area after the fetch-stage resize that comes first in the
            official pipeline; ``None`` turns the fetch stage off.
        fetch_max_pixels: largest area after the fetch-stage resize.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    min_pixels: int = OFFICIAL_MIN_PIXELS
    max_pixels: int = OFFICIAL_MAX_PIXELS
    fetch_min_pixels: int | None = FETCH_MIN_PIXELS
    fetch_max_pixels: int = FETCH_MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ValueError(
                f"max_pixels ({self.max_pixels}) must be at least min_pixels ({self.min_pixels}) "
                f"and hold one token ({self.factor**2} pixels)"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std must have three values, one per channel")

    @property
    def factor(self) -> int:
        """Side in pixels of one merged visual token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: 3 · temporal_patch_size · patch_size²."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        *,
        fetch_min_pixels: int | None = FETCH_MIN_PIXELS,
        fetch_max_pixels: int = FETCH_MAX_PIXELS,
    ) -> ImageConfig:
        """Read ``preprocessor_config.json`` (or the image part of ``processor_config.json``).

        Both layouts are understood: ``min_pixels``/``max_pixels`` and
        ``size.shortest_edge``/``size.longest_edge``.

        Limits not given here are those of the official evaluation (784 and 2359296), which
        overrides whatever the checkpoint says; only a *smaller* ``max_pixels`` in the
        checkpoint is honoured, since such a model has never seen larger images.

        Raises:
            CheckpointError: if the file is missing, is not JSON, or asks for a pipeline other
                than bicubic resize, rescale and normalise of RGB images.
        """
        directory = Path(directory)
        path, data = _read_preprocessor(directory)

        for flag in ("do_resize", "do_rescale", "do_normalize"):
            if data.get(flag) is False:
                raise CheckpointError(f"{path}: {flag}=false is not supported; set it to true")
        if data.get("resample", _BICUBIC) not in (_BICUBIC, None):
            raise CheckpointError(
                f"{path}: resample={data['resample']!r} is not supported; Qwen2-VL uses 3 (bicubic)"
            )

        size = data.get("size")
        size = size if isinstance(size, dict) else {}
        stored_max = data.get("max_pixels") or size.get("longest_edge") or OFFICIAL_MAX_PIXELS
        try:
            default = cls()
            return cls(
                patch_size=int(data.get("patch_size", default.patch_size)),
                merge_size=int(data.get("merge_size", default.merge_size)),
                temporal_patch_size=int(
                    data.get("temporal_patch_size", default.temporal_patch_size)
                ),
                image_mean=tuple(float(v) for v in data.get("image_mean", default.image_mean)),
                image_std=tuple(float(v) for v in data.get("image_std", default.image_std)),
                rescale_factor=float(data.get("rescale_factor", default.rescale_factor)),
                min_pixels=OFFICIAL_MIN_PIXELS if min_pixels is None else min_pixels,
                max_pixels=(
                    min(int(stored_max), OFFICIAL_MAX_PIXELS) if max_pixels is None else max_pixels
                ),
                fetch_min_pixels=fetch_min_pixels,
                fetch_max_pixels=fetch_max_pixels,
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error


def _read_preprocessor(directory: Path) -> tuple[Path, dict[str, Any]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as JSON ({error}); copy the file again from the "
                "checkpoint or its base model"
            ) from error
        if isinstance(data, dict) and name == "processor_config.json":
            data = data.get("image_processor")
            if data is None:  # older transformers keep only the chat settings in this file
                continue
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a JSON object; copy the file again")
        return path, data
    raise CheckpointError(
        f"{directory}: no preprocessor_config.json. Published checkpoints may lack it; copy it "
        "from the base model (for Qwen2-VL-2B: Qwen/Qwen2-VL-2B-Instruct) into this directory"
    )
