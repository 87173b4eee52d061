"""Architecture of the bundled model, and writing it in the official checkpoint layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ume_models.backbone.checkpoint import write_json, write_state
from ume_models.embedders.library_files import write_identity, write_library_files

from .data import IMAGE_MEAN, IMAGE_STD
from .network import PlumeNetwork
from .tokens import save_tokenizer, token_id


def architecture(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a small Qwen2-VL in the older, flat layout published checkpoints have.

    Args:
        tokenizer: gives the vocabulary size and the token ids.
        changes: top-level entries to replace; ``vision_config`` entries are merged.
    """

    width = changes.get("hidden_size", 128)
    vision = {
        "depth": 2,
        "embed_dim": 80,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "mlp_ratio": 2,
        "model_type": "qwen2_vl",
        "num_heads": 5,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    vision.update(changes.pop("vision_config", {}))
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token_id(tokenizer, "<|endoftext|>"),
        "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": width,
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 8192,
        "max_window_layers": 3,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.52.3",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_config": vision,
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_token_id": token_id(tokenizer, "<|image_pad|>"),
        "vocab_size": tokenizer.get_vocab_size(),
    }
    config.update(changes)
    return config


def save_checkpoint(
    network: PlumeNetwork, config: dict[str, Any], tokenizer: Tokenizer, directory: Path
) -> None:
    """Write weights, configuration, tokenizer and preprocessor in the official layout."""
    directory.mkdir(parents=True, exist_ok=True)
    write_state(directory, network.state_dict())
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
            "pad_token_id": config["bos_token_id"],
            "transformers_version": config["transformers_version"],
        },
    )
    vision = config["vision_config"]
    write_json(
        directory / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": list(IMAGE_STD),
            "max_pixels": 2359296,
            "merge_size": vision["spatial_merge_size"],
            "min_pixels": 784,
            "patch_size": vision["patch_size"],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 2359296, "shortest_edge": 784},
            "temporal_patch_size": vision["temporal_patch_size"],
        },
    )
    save_tokenizer(tokenizer, directory)
    # the clips it was trained on are resized frame by frame
    write_identity(directory, "plume", "official-qwen-vl-utils-0.0.11")
    write_library_files(directory)
