"""Architecture of a Qwen2-VL / Qwen2.5-VL checkpoint, read from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.backbone.fields import (
    FLAG,
    OBJECT,
    field,
    one_of,
    read_json,
    real,
    several,
    whole,
)
from ume_models.errors import CheckpointError

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
MAX_LAYERS = 1000
VISION_ACTIVATIONS = ("quick_gelu", "silu", "gelu")


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: ``depth`` blocks of width ``embed_dim``, output width ``out_dim``.

    ``window_size`` (pixels) and ``full_attention_blocks`` are set for Qwen2.5-VL, which attends
    inside windows in the other blocks; None for Qwen2-VL.
    """

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    out_dim: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    hidden_act: str
    window_size: int | None = None
    full_attention_blocks: tuple[int, ...] = ()
    tokens_per_second: float = 1.0

    @property
    def patch_dim(self) -> int:
        """Values per patch in the processor layout: C · T · p · p."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class BackboneConfig:
    """Text decoder and vision tower of a checkpoint, plus the token ids it names.

    ``raw`` keeps the file's content, which is what ``save_pretrained`` writes back.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionConfig
    raw: Mapping[str, Any]


def _vision(raw: Mapping[str, Any], source: str, family: str, hidden_size: int) -> VisionConfig:
    get = partial(field, raw, f"{source}, vision_config")
    patch_size = get("patch_size", whole(1, 1024), raw.get("spatial_patch_size", 14))
    merge_size = get("spatial_merge_size", whole(1, 16), 2)
    common = {
        "depth": get("depth", whole(1, MAX_LAYERS), 32),
        "num_heads": get("num_heads", whole(), 16),
        # More channels than those of RGB never come out of an image.
        "in_channels": get("in_channels", whole(3, 3), raw.get("in_chans", 3)),
        "patch_size": patch_size,
        "temporal_patch_size": get("temporal_patch_size", whole(1, 64), 2),
        "merge_size": merge_size,
    }
    if family == "qwen2_vl":
        width = get("embed_dim", whole(), 1280)
        vision = VisionConfig(
            embed_dim=width,
            intermediate_size=int(width * get("mlp_ratio", real(1, 100), 4)),
            out_dim=get("hidden_size", whole(), hidden_size),
            hidden_act=get("hidden_act", one_of(VISION_ACTIVATIONS), "quick_gelu"),
            **common,
        )
    else:
        blocks = get("fullatt_block_indexes", several(whole(0, MAX_LAYERS)), (7, 15, 23, 31))
        vision = VisionConfig(
            embed_dim=get("hidden_size", whole(), 1280),
            intermediate_size=get("intermediate_size", whole(), 3420),
            out_dim=get("out_hidden_size", whole(), hidden_size),
            hidden_act=get("hidden_act", one_of(VISION_ACTIVATIONS), "silu"),
            window_size=get("window_size", whole(patch_size * merge_size), 112),
            full_attention_blocks=tuple(blocks),
            tokens_per_second=get("tokens_per_second", real(0, 1000), 4),
            **common,
        )
    if vision.embed_dim % (4 * vision.num_heads):
        raise CheckpointError(
            f"{source}: vision_config has width {vision.embed_dim}, which {vision.num_heads} heads "
            "cannot share in multiples of four; copy the file again"
        )
    return vision


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> BackboneConfig:
    """Architecture from the content of ``config.json``, flat (published) or nested (newer) layout.

    Raises:
        CheckpointError: another architecture, or an option this package does not run.
    """
    family = raw.get("model_type", "")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type is {family!r}; this package runs {' and '.join(FAMILIES)}"
        )
    text: dict[str, Any] = {**raw}
    if raw.get("text_config") is not None:
        text |= field(raw, source, "text_config", OBJECT)
    if text.get("use_sliding_window"):
        raise CheckpointError(
            f"{source}: use_sliding_window is not supported; the official models do not"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{source}: quantised checkpoints are not supported; use one in bfloat16, float16 or "
            "float32"
        )
    get = partial(field, text, source)
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{source}: hidden_act {text['hidden_act']!r} is not supported (silu is)"
        )
    heads = get("num_attention_heads", whole())
    kv_heads = get("num_key_value_heads", whole(), heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {heads} query heads cannot share {kv_heads} key/value heads"
        )
    hidden_size = get("hidden_size", whole())
    if text.get("head_dim") is None:
        text["head_dim"] = hidden_size // heads
    theta, section = _rope(text, source)
    vision = field(raw, source, "vision_config", OBJECT)
    return BackboneConfig(
        family=family,
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size", whole()),
        num_layers=get("num_hidden_layers", whole(1, MAX_LAYERS)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=text["head_dim"],
        rms_eps=float(get("rms_norm_eps", real(0, 1), 1e-6)),
        rope_theta=theta,
        mrope_section=section,
        vocab_size=get("vocab_size", whole(1, 10**7)),
        max_position_embeddings=get("max_position_embeddings", whole(1, 10**7), 32768),
        tie_word_embeddings=field(
            raw, source, "tie_word_embeddings", FLAG, text.get("tie_word_embeddings", False)
        ),
        image_token_id=field(raw, source, "image_token_id", whole(0, 10**7), 151655),
        video_token_id=field(raw, source, "video_token_id", whole(0, 10**7), 151656),
        vision=_vision(vision, source, family, hidden_size),
        raw=dict(raw),
    )


def _rope(text: Mapping[str, Any], source: str) -> tuple[float, tuple[int, int, int]]:
    """Base and M-RoPE section of the rotary embedding."""
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = field(text, source, name, OBJECT) if text.get(name) else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(
            f"{source}: RoPE type {kind!r} is not supported (default and mrope are)"
        )
    get = partial(field, rope, f"{source}, {name}")
    head_dim = field(text, source, "head_dim", whole())
    section = tuple(get("mrope_section", several(whole(0), 3), (16, 24, 24)))
    if 2 * sum(section) != head_dim:
        raise CheckpointError(
            f"{source}: mrope_section {section} does not add up to half of the head size {head_dim}"
        )
    theta = get("rope_theta", real(1, 1e12), text.get("rope_theta", 1e6))
    return float(theta), section


def read_config(directory: Path) -> BackboneConfig:
    """Architecture of the checkpoint in ``directory``; errors as ``parse_config``."""
    path = directory / "config.json"
    return parse_config(read_json(path), str(path))
