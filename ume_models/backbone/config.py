"""Architecture of a Qwen2-VL / Qwen2.5-VL checkpoint, read from its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def _vision(raw: Mapping[str, Any], family: str, hidden_size: int) -> VisionConfig:
    common = {
        "depth": raw.get("depth", 32),
        "num_heads": raw.get("num_heads", 16),
        "in_channels": raw.get("in_channels", raw.get("in_chans", 3)),
        "patch_size": raw.get("patch_size", raw.get("spatial_patch_size", 14)),
        "temporal_patch_size": raw.get("temporal_patch_size", 2),
        "merge_size": raw.get("spatial_merge_size", 2),
    }
    if family == "qwen2_vl":
        width = raw.get("embed_dim", 1280)
        return VisionConfig(
            embed_dim=width,
            intermediate_size=int(width * raw.get("mlp_ratio", 4)),
            out_dim=raw.get("hidden_size", hidden_size),
            hidden_act=raw.get("hidden_act", "quick_gelu"),
            **common,
        )
    return VisionConfig(
        embed_dim=raw.get("hidden_size", 1280),
        intermediate_size=raw.get("intermediate_size", 3420),
        out_dim=raw.get("out_hidden_size", hidden_size),
        hidden_act=raw.get("hidden_act", "silu"),
        window_size=raw.get("window_size", 112),
        full_attention_blocks=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=raw.get("tokens_per_second", 4),
        **common,
    )


def _check_numbers(text: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError unless the sizes are usable."""
    required = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    optional = ("num_key_value_heads", "max_position_embeddings")
    for name in (*required, *(n for n in optional if n in text)):
        value = text.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**7:
            raise CheckpointError(f"{source}: {name} is {value!r}; it must be a positive integer")
    if text["num_hidden_layers"] > MAX_LAYERS:
        raise CheckpointError(
            f"{source}: num_hidden_layers is {text['num_hidden_layers']}; at most {MAX_LAYERS}"
        )
    kv_heads = text.get("num_key_value_heads", text["num_attention_heads"])
    if text["num_attention_heads"] % kv_heads:
        raise CheckpointError(
            f"{source}: {text['num_attention_heads']} query heads cannot share {kv_heads} "
            "key/value heads"
        )


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> BackboneConfig:
    """Architecture from the content of ``config.json``, flat (published) or nested (newer) layout.

    Raises:
        CheckpointError: another architecture, or an option this package does not run.
    """
    family = str(raw.get("model_type", ""))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type is {family!r}; this package runs {' and '.join(FAMILIES)}"
        )
    text: dict[str, Any] = {**raw, **(raw.get("text_config") or {})}
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(
            f"{source}: RoPE type {kind!r} is not supported (default and mrope are)"
        )
    if text.get("use_sliding_window"):
        raise CheckpointError(
            f"{source}: use_sliding_window is not supported; the official models do not"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{source}: quantised checkpoints are not supported; use one in bfloat16, float16 or "
            "float32"
        )
    _check_numbers(text, source)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    section = tuple(rope.get("mrope_section", (16, 24, 24)))
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != head_dim:
        raise CheckpointError(
            f"{source}: mrope_section {section} does not add up to half of the head size {head_dim}"
        )
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{source}: hidden_act {text['hidden_act']!r} is not supported (silu is)"
        )
    if not isinstance(raw.get("vision_config"), Mapping):
        raise CheckpointError(f"{source}: vision_config is missing")
    vision = _vision(raw["vision_config"], family, text["hidden_size"])
    if (
        vision.num_heads < 1
        or vision.embed_dim % (4 * vision.num_heads)
        or not 0 < vision.depth <= MAX_LAYERS
        or vision.hidden_act not in VISION_ACTIVATIONS
        or min(vision.patch_size, vision.merge_size, vision.temporal_patch_size) < 1
    ):
        raise CheckpointError(f"{source}: vision_config does not describe a Qwen2-VL vision tower")
    return BackboneConfig(
        family=family,
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=(section[0], section[1], section[2]),
        vocab_size=text["vocab_size"],
        max_position_embeddings=text.get("max_position_embeddings", 32768),
        tie_word_embeddings=bool(
            raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        ),
        image_token_id=raw.get("image_token_id", 151655),
        video_token_id=raw.get("video_token_id", 151656),
        vision=vision,
        raw=dict(raw),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_config(directory: Path) -> BackboneConfig:
    """Architecture of the checkpoint in ``directory``; errors as ``parse_config``."""
    path = directory / "config.json"
    return parse_config(read_json(path), str(path))
