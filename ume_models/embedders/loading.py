"""Checkpoint directory or hub id to a ready ``PlumeForEmbedding``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from ume_kernels import MoETransition
from ume_models.backbone.checkpoint import (
    ADAPTER_PREFIX,
    fit,
    merge_lora,
    published_key,
    read_state,
    read_tensors,
    weight_files,
)
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
READABLE_DTYPES = (*DTYPES.values(), torch.float64)
Read = Callable[[Path, "str | Path | None"], "tuple[dict[str, torch.Tensor], Path]"]
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
    latent_steps = check_rollout(latent_steps, context)
    if engine not in ("fast", "reference"):
        raise ValueError(f"engine must be 'fast' or 'reference', got {engine!r}")
    target = pick_device(device)
    directory = resolve(path_or_id)

    def make_processor(tokenizer: Any, source: Path) -> Processor:
        images = ImageConfig.from_checkpoint(source, min_pixels, max_pixels)
        return Processor(tokenizer, images, multi_image=multi_image, empty=empty)

    settings = PlumeSettings(engine, latent_steps, context, max_new_tokens, disc_offset)
    try:
        model = _load(directory, dtype, base, adapter, top_k, settings, make_processor)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # Damaged JSON can be wrong in any way; name the folder instead of our line of code.
        raise CheckpointError(
            f"{directory}: a file of the checkpoint has unexpected content "
            f"({type(error).__name__}: {error}); compare its JSON files with the original's"
        ) from error
    model = model.to(device=target).eval().requires_grad_(False)
    if model.latent_moe_transition is not None:
        model.latent_moe_transition.pack_experts()
    return model


def _load(
    directory: Path,
    dtype: str | torch.dtype,
    base: str | Path | None,
    adapter: bool,
    top_k: int,
    settings: PlumeSettings,
    make_processor: Callable[[Any, Path], Processor],
    read: Read | None = None,
) -> PlumeForEmbedding:
    """Everything that reads files: a model on the CPU."""
    state, weights_from = (read or _read_weights)(directory, base)
    files = directory if (directory / "config.json").is_file() else weights_from
    config = read_config(files)
    tokenizer = load_tokenizer(_first_with(("tokenizer.json", "vocab.json"), directory, files))
    tokens = token_ids(tokenizer, _eos(files), directory)
    preprocessor = _first_with(("preprocessor_config.json",), directory, files)
    processor = make_processor(tokenizer, preprocessor)
    _check_patches(config, processor.config, files)
    _check_pads(config, tokenizer, files)
    config = _resize_vocabulary(state, config, tokenizer, directory)
    model = _build(config, state, adapter, top_k, directory)
    model = model.to(dtype=_pick_dtype(dtype, state))
    sources = (directory, files, weights_from)
    model.attach(tokenizer, processor, tokens, settings, sources)
    return model


def examine(directory: Path) -> torch.dtype:
    """Refuse what ``load`` would refuse about a checkpoint, without reading its weights.

    Their headers are read: names, shapes and types. What only the values tell (NaN), it does not
    find.

    Returns:
        The type ``load`` would give the model by default.

    Raises:
        CheckpointError: as ``load``.
    """
    settings = PlumeSettings("fast", 8, "disc", 1, 0)

    def make_processor(tokenizer: Any, source: Path) -> Processor:
        return Processor(tokenizer, ImageConfig.from_checkpoint(source, None, None))

    try:
        model = _load(directory, "auto", None, True, 2, settings, make_processor, _read_headers)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{directory}: a file of the checkpoint has unexpected content "
            f"({type(error).__name__}: {error}); compare its JSON files with the original's"
        ) from error
    return next(model.parameters()).dtype


def _read_headers(directory: Path, base: str | Path | None) -> tuple[dict[str, torch.Tensor], Path]:
    """As ``_read_weights``, with tensors that have a shape and a type only; a LoRA adds nothing."""
    home, added = directory, []
    if (directory / "adapter_config.json").is_file():
        named = base or read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if not named:
            raise CheckpointError(f"{directory}: adapter_config.json names no base model")
        home, added = resolve(named, weights=False), sorted(directory.glob("*.safetensors"))
    state = {
        published_key(key): torch.empty_like(tensor, device="meta")
        for key, tensor, _ in read_tensors([*weight_files(home), *added])
        if ADAPTER_PREFIX in key or not (".lora_" in key or key.startswith("base_model."))
    }
    return state, home


def resolve(path_or_id: str | Path | None, weights: bool = True) -> Path:
    """Local directory of a checkpoint; a hub id is downloaded (weights, tokenizer, JSON only).

    Args:
        path_or_id: directory, hub id, or None for the small bundled model.
        weights: False downloads everything but the weights.

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
        raise CheckpointError(
            f"{path}: no such directory; give a checkpoint's folder, or a hub id (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "merges.txt", *["*.safetensors"] * weights]
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


def _check_pads(config: BackboneConfig, tokenizer: Any, source: Path) -> None:
    """The pad ids of config.json must be those of the tokenizer."""
    for name, token, index in (
        ("image_token_id", "<|image_pad|>", config.image_token_id),
        ("video_token_id", "<|video_pad|>", config.video_token_id),
    ):
        known = tokenizer.get_vocab().get(token)
        if known != index:
            raise CheckpointError(
                f"{source}: config.json has {name} {index}, but {token} is {known} in the "
                "tokenizer; they belong to different models"
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
    if EMBEDDING not in state or state[EMBEDDING].ndim != 2:
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


class _Unfilled(TorchFunctionMode):
    """Random initialisation does nothing: on the meta device it has torch import its compiler.

    That takes two seconds, more than all else before the first embedding of a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _build(
    config: BackboneConfig,
    state: Mapping[str, torch.Tensor],
    use_adapter: bool,
    top_k: int,
    source: Path,
) -> PlumeForEmbedding:
    """A model on the loaded tensors; nothing is initialised or copied."""
    tied = HEAD not in state
    with torch.device("meta"), _Unfilled():
        adapter = _adapter_shape(config, state, top_k) if use_adapter else None
        model = PlumeForEmbedding(config, adapter, config.vocab_size, tied)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    other = {str(t.dtype): k for k, t in state.items() if t.dtype not in READABLE_DTYPES}
    if other:
        kind, key = next(iter(other.items()))
        raise CheckpointError(
            f"{source}: {key} is {kind}; quantised weights are not supported, use a checkpoint in "
            "bfloat16, float16 or float32"
        )
    extra = fit(state, expected, source)
    unknown = [
        key
        for key in extra
        if not key.endswith("inv_freq")  # computed from the configuration
        and (use_adapter or not key.startswith(ADAPTER_PREFIX))
    ]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no place in the model of config.json: "
            f"{', '.join(unknown[:4])}; the weights belong to another configuration"
        )
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
        raise ValueError(
            f"top_k must be 1 … {experts}, the experts of this checkpoint, got {top_k}; "
            "pass load(..., top_k=…)"
        )
    return MoETransition(
        config.hidden_size,
        num_experts=experts,
        top_k=top_k,
        use_shared_expert=any(k.startswith(f"{ADAPTER_PREFIX}shared_expert.") for k in state)
        or router is None,
        step_embed_max_steps=32 if table is None or table.ndim != 2 else table.shape[0],
    )


def pick_device(device: str | torch.device) -> torch.device:
    """The device meant by ``"auto"``, or the one named.

    Raises:
        ValueError: it does not exist here or is neither a CPU nor a CUDA device.
    """
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
            f"{torch.cuda.device_count()} GPUs; `ume doctor` tells more, cpu works"
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
        chosen = torch.float32 if chosen == torch.float64 else chosen
    else:
        name = str(dtype).removeprefix("torch.")
        chosen = DTYPES.get(name, torch.int8)
    if chosen not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)}; got {dtype!r}")
    return chosen
