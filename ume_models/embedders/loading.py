"""Checkpoint directory or hub id to a ready ``PlumeForEmbedding``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ume_kernels import MoETransition
from ume_models.backbone.checkpoint import ADAPTER_PREFIX, fit, merge_lora, read_state
from ume_models.backbone.config import BackboneConfig, read_config, read_json
from ume_models.backbone.tokenizer import load_tokenizer, new_row_sources, token_ids
from ume_models.embedders.plume import (
    Context,
    Engine,
    PlumeForEmbedding,
    PlumeSettings,
    check_rollout,
)
from ume_models.errors import CheckpointError
from ume_models.processing.config import ImageConfig
from ume_models.processing.processor import Processor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def load(
    path_or_id: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    latent_steps: int = 8,
    context: Context = "disc",
    *,
    engine: Engine = "fast",
    base: str | Path | None = None,
    adapter: bool = True,
    top_k: int = 2,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    multi_image: Literal["all", "first"] | None = None,
    empty: Literal["error", "reference"] = "error",
    max_new_tokens: int = 1,
    disc_offset: int = 0,
) -> PlumeForEmbedding:
    """Load a PLUME checkpoint.

    Args:
        path_or_id: checkpoint directory, hub id, or None for the small bundled model.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        dtype: ``"auto"`` keeps the checkpoint's; or float32, float16, bfloat16.
        latent_steps: default K.
        context: default router context, ``"disc"``, ``"prefix_last"`` or ``"none"``.
        engine: ``"fast"``, or ``"reference"`` for the official step-by-step loop.
        base: base checkpoint of a LoRA directory; default: the one its adapter config names.
        adapter: False runs without the latent adapter (hidden states are fed back unchanged).
        top_k: experts per latent step (the checkpoint does not record it; officially 2).
        min_pixels, max_pixels: image limits; default those of the official evaluation.
        multi_image, empty: see ``Processor``.
        max_new_tokens, disc_offset: see ``PlumeSettings``.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit; says which and what to do.
        ValueError: an argument is out of range.
    """
    check_rollout(latent_steps, context)
    if engine not in ("fast", "reference"):
        raise ValueError(f"engine must be 'fast' or 'reference', got {engine!r}")
    directory = resolve(path_or_id)
    state, weights_from = _read_weights(directory, base)
    files = directory if (directory / "config.json").is_file() else weights_from
    config = read_config(files)
    tokenizer = load_tokenizer(_first_with(("tokenizer.json", "vocab.json"), directory, files))
    image_config = ImageConfig.from_checkpoint(
        _first_with(("preprocessor_config.json",), directory, files), min_pixels, max_pixels
    )
    _check_patches(config, image_config, files)
    tokens = token_ids(tokenizer, _eos(files), directory)
    config = _resize_vocabulary(state, config, tokenizer, directory)
    model = _build(config, state, adapter, top_k, directory)
    target = _pick_device(device)
    model = model.to(device=target, dtype=_pick_dtype(dtype, state)).eval().requires_grad_(False)
    processor = Processor(tokenizer, image_config, multi_image=multi_image, empty=empty)
    settings = PlumeSettings(engine, latent_steps, context, max_new_tokens, disc_offset)
    model.attach(tokenizer, processor, tokens, settings, files)
    return model


def resolve(path_or_id: str | Path | None) -> Path:
    """Local directory of a checkpoint; a hub id is downloaded (weights, tokenizer, JSON only).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be had.
    """
    if path_or_id is None:
        from ume_models.assets import tiny_checkpoint

        return tiny_checkpoint()
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_id)
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the checkpoint's directory")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such directory")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{text}: no such directory. As a hub id it cannot be downloaded either "
            f"({type(error).__name__}: {reason}); check the path, or download the files and give "
            "their folder"
        ) from None


def _read_weights(directory: Path, base: str | Path | None) -> tuple[dict[str, torch.Tensor], Path]:
    """State dict, LoRA merged, and the directory the base weights came from."""
    if not (directory / "adapter_config.json").is_file():
        if base is not None:
            raise CheckpointError(
                f"{directory}: base= was given, but there is no adapter_config.json to merge"
            )
        return read_state(directory), directory
    named = base or read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise CheckpointError(
            f"{directory}: adapter_config.json names no base model; pass load(..., base=PATH)"
        )
    base_directory = resolve(named)
    state = read_state(base_directory)
    merge_lora(state, directory)
    return state, base_directory


def _first_with(names: tuple[str, ...], *directories: Path) -> Path:
    """The first directory that holds one of the files; the first one if none does."""
    for directory in directories:
        if any((directory / name).is_file() for name in names):
            return directory
    return directories[0]


def _check_patches(config: BackboneConfig, images: ImageConfig, source: Path) -> None:
    vision = config.vision
    ours = (vision.patch_size, vision.merge_size, vision.temporal_patch_size)
    theirs = (images.patch_size, images.merge_size, images.temporal_patch_size)
    if ours != theirs:
        raise CheckpointError(
            f"{source}: config.json has (patch, merge, temporal) sizes {ours}, "
            f"preprocessor_config.json {theirs}; they belong to different models"
        )


def _eos(source: Path) -> frozenset[int]:
    """End-of-sequence ids of ``generation_config.json``; empty where it names none."""
    path = source / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, list) else [value]))


def _resize_vocabulary(
    state: dict[str, torch.Tensor], config: BackboneConfig, tokenizer: Any, source: Path
) -> BackboneConfig:
    """Give embedding and head one row per token of the tokenizer, as the official loader does."""
    if EMBEDDING not in state:
        raise CheckpointError(f"{source}: no {EMBEDDING}; this is not a Qwen2-VL checkpoint")
    size = len(tokenizer)
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    for key in (EMBEDDING, HEAD):
        rows = state[key].shape[0] if key in state else size
        if rows > size:
            state[key] = state[key][:size]
        elif rows < size:
            copied = new_row_sources(tokenizer, config.family, rows, source)
            state[key] = torch.cat([state[key], state[key][copied]])
            warnings.warn(
                f"{source}: {key} lacks {size - rows} added tokens; their rows were copied as at "
                "the start of the official training, so they are untrained",
                stacklevel=3,
            )
    return replace(config, vocab_size=size)


def _build(
    config: BackboneConfig,
    state: Mapping[str, torch.Tensor],
    use_adapter: bool,
    top_k: int,
    source: Path,
) -> PlumeForEmbedding:
    """A model on the loaded tensors; nothing is initialised or copied."""
    tied = HEAD not in state
    with torch.device("meta"):
        adapter = _adapter_shape(config, state, top_k) if use_adapter else None
        model = PlumeForEmbedding(config, adapter, config.vocab_size, tied)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    extra = fit(state, expected, source)
    ignorable = [
        k
        for k in extra
        if k.endswith("inv_freq") or (not use_adapter and k.startswith(ADAPTER_PREFIX))
    ]
    adapter_extra = [k for k in extra if k.startswith(ADAPTER_PREFIX) and k not in ignorable]
    if adapter_extra:
        raise CheckpointError(f"{source}: unknown adapter tensors: {', '.join(adapter_extra[:4])}")
    if len(extra) > len(ignorable):
        unknown = [k for k in extra if k not in ignorable]
        warnings.warn(f"{source}: ignoring unknown tensors {', '.join(unknown[:4])}", stacklevel=3)
    model.load_state_dict({key: state[key] for key in expected}, assign=True)
    return model


def _adapter_shape(
    config: BackboneConfig, state: Mapping[str, torch.Tensor], top_k: int
) -> MoETransition:
    """The adapter with the number of experts and steps that the tensors have."""
    router = state.get(f"{ADAPTER_PREFIX}router.weight")
    table = state.get(f"{ADAPTER_PREFIX}step_embed.weight")
    experts = 4 if router is None or router.ndim != 2 else router.shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 … {experts} for this checkpoint, got {top_k}")
    return MoETransition(
        config.hidden_size,
        num_experts=experts,
        top_k=top_k,
        use_shared_expert=any(k.startswith(f"{ADAPTER_PREFIX}shared_expert.") for k in state)
        or router is None,
        step_embed_max_steps=32 if table is None or table.ndim != 2 else table.shape[0],
    )


def _pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"there is no device {device!r}: torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs; device='cpu' works"
        )
    return chosen


def _pick_dtype(dtype: str | torch.dtype, state: Mapping[str, torch.Tensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        chosen = dtype
    elif dtype == "auto":
        sizes: Counter[torch.dtype] = Counter()
        for tensor in state.values():
            sizes[tensor.dtype] += tensor.numel()
        chosen = sizes.most_common(1)[0][0]
    else:
        name = str(dtype).removeprefix("torch.")
        chosen = DTYPES.get(name, torch.int8)
    if chosen not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)}; got {dtype!r}")
    return chosen
