"""Image geometry and normalisation, read from a checkpoint's ``preprocessor_config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.backbone.fields import OBJECT, field, read_json, real, several, whole
from ume_models.errors import CheckpointError, OptionError

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
        stored_max_pixels: largest area of a picture that the checkpoint was made for, if it says.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    stored_max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stored_max_pixels is not None and self.stored_max_pixels < self.factor**2:
            raise OptionError(
                f"max_pixels ({self.stored_max_pixels}) must hold one token "
                f"({self.factor**2} pixels)"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise OptionError("image_mean and image_std must have three values, one per channel")

    @property
    def factor(self) -> int:
        """Side in pixels of one merged visual token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: 3 · temporal_patch_size · patch_size²."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> ImageConfig:
        """Read ``preprocessor_config.json`` (or the image part of ``processor_config.json``).

        Both layouts are understood: ``max_pixels`` and ``size.longest_edge``.

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

        default = cls()
        get = partial(field, data, str(path))
        patch_size = get("patch_size", whole(1, 1024), default.patch_size)
        merge_size = get("merge_size", whole(1, 16), default.merge_size)
        size = get("size", OBJECT) if data.get("size") else {}
        stored_max = data.get("max_pixels") or size.get("longest_edge")
        if stored_max is not None:
            least = (patch_size * merge_size) ** 2
            field({"max_pixels": stored_max}, str(path), "max_pixels", whole(least, 10**12))
        mean = get("image_mean", several(real(-1000, 1000), 3), default.image_mean)
        std = get("image_std", several(real(1e-6, 1000), 3), default.image_std)
        return cls(
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=get(
                "temporal_patch_size", whole(1, 64), default.temporal_patch_size
            ),
            image_mean=tuple(map(float, mean)),
            image_std=tuple(map(float, std)),
            rescale_factor=float(get("rescale_factor", real(1e-9, 1), default.rescale_factor)),
            stored_max_pixels=stored_max,
        )


def _read_preprocessor(directory: Path) -> tuple[Path, dict[str, Any]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        data = read_json(path)
        if name == "processor_config.json":
            if data.get("image_processor") is None:  # older transformers keep only chat settings
                continue
            data = field(data, str(path), "image_processor", OBJECT)
        return path, data
    raise CheckpointError(
        f"{directory}: no preprocessor_config.json. Published checkpoints may lack it; copy it "
        "from the base model (for Qwen2-VL-2B: Qwen/Qwen2-VL-2B-Instruct) into this directory"
    )
