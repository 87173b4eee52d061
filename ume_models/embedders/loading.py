"""Checkpoint directory or hub id to a ready model of its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from ume_models.backbone.checkpoint import (
    ADAPTER_PREFIX,
    fit,
    merge_lora,
    published_key,
    read_state,
    read_tensors,
    weight_files,
)
from ume_models.backbone.config import BackboneConfig, read_config
from ume_models.backbone.fields import OBJECT, TEXT, one_of, read_json
from ume_models.backbone.fields import field as json_field
from ume_models.backbone.tokenizer import load_tokenizer
from ume_models.embedders.base import BackboneEmbedder, EngineName, Signs
from ume_models.embedders.library_files import IDENTITY_FILE
from ume_models.embedders.registry import families, pick_family, pick_profile, profiles
from ume_models.errors import CheckpointError, ErrorKind, OptionError
from ume_models.processing.config import ImageConfig
from ume_models.processing.processor import Processor
from ume_models.processing.rules import Pictures
from ume_models.profile import Profile

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
READABLE_DTYPES = (*DTYPES.values(), torch.float64)
Weights = tuple[dict[str, torch.Tensor], Path]
"""Tensors by their published names, and the folder the base's came from."""

Model = TypeVar("Model", bound=BackboneEmbedder)
_SAVED = ("min_pixels", "max_pixels", "multi_image", "pictures", "empty")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def load(
    path_or_id: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    family: str | None = None,
    profile: str | Profile | None = None,
    engine: EngineName = "fast",
    base: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    multi_image: Literal["all", "first"] | None = None,
    pictures: Pictures | None = None,
    empty: Literal["error", "reference"] | None = None,
    **options: Any,
) -> BackboneEmbedder:
    """Load a checkpoint as the embedder it belongs to.

    Args:
        path_or_id: checkpoint directory, hub id, or None for the small bundled model.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        dtype: ``"auto"`` keeps the checkpoint's; or float32, float16, bfloat16.
        family: ``"plume"``, ``"vlm2vec"``, …, see ``ume_models.families()``; default: what the
            checkpoint says or looks like.
        profile: convention of prompts, pixels and tap, see ``ume_models.profiles(family)``;
            default: the one that the checkpoint names, else the family's first.
        engine: ``"fast"``, or ``"reference"`` for the official code's way, step by step.
        base: base checkpoint of a LoRA directory; default: the one its adapter config names.
        min_pixels, max_pixels: image limits; default those of the profile.
        pictures: ``"as_seen"`` embeds what a viewer shows (turned by EXIF, 16-bit grey scaled,
            transparency on white), ``"official"`` what official codes do of it, the default.
        multi_image, empty: see ``MediaRules`` and ``Processor``.
        options: the family's own: defaults of its embeddings (``PlumeOptions``: ``mode``,
            ``context``, …), and how it is built (PLUME: ``adapter``, ``top_k``).

    What is left out is as it was when ``save_pretrained`` wrote the checkpoint, under its profile.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit, or family and checkpoint do
            not agree; says which and what to do.
        OptionError: an argument is out of range, or the family does not have it.
    """
    if engine not in ("fast", "reference"):
        raise OptionError(f"engine must be 'fast' or 'reference', got {engine!r}")
    target = pick_device(device)
    directory = resolve(path_or_id)
    chosen = Chosen(
        family, profile, engine, base, min_pixels, max_pixels, multi_image, pictures, empty, options
    )
    model = _load(directory, dtype, chosen, _read_weights(directory, base))
    return model.to(device=target).eval().requires_grad_(False)


@dataclass(frozen=True)
class Chosen:
    """What the caller of ``load`` chose, under the same names."""

    family: str | None = None
    profile: str | Profile | None = None
    engine: EngineName = "fast"
    base: str | Path | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    multi_image: Literal["all", "first"] | None = None
    pictures: Pictures | None = None
    empty: Literal["error", "reference"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def completed(self, saved: Mapping[str, Any]) -> Chosen:
        """The same, with what the checkpoint was saved with in place of what was left out."""
        options = {k: v for k, v in self.options.items() if v is not None}
        given = {k: v for k in _SAVED if (v := getattr(self, k)) is not None}
        every = {**saved, **options, **given}
        return replace(self, **{k: every.pop(k, None) for k in _SAVED}, options=every)


@dataclass(frozen=True)
class Opened:
    """A checkpoint without the values of its weights.

    Attributes:
        family, profile: as what it is read.
        config: the architecture that ``config.json`` describes.
        tokenizer, processor: make inputs.
        sources: its folder, that of ``config.json``, and that of the weights.
        options: the family's own that were chosen or saved with it.
    """

    family: type[BackboneEmbedder]
    profile: Profile
    config: BackboneConfig
    tokenizer: Any
    processor: Processor
    sources: tuple[Path, Path, Path]
    options: Mapping[str, Any]


def open_checkpoint(path_or_id: str | Path | None = None, **options: Any) -> Opened:
    """What ``load(path_or_id, **options)`` puts around the weights; they are not read.

    Raises:
        CheckpointError, OptionError: as ``load``.
    """
    directory = resolve(path_or_id)
    names = {f.name for f in fields(Chosen)}
    given = {name: options.pop(name) for name in names & {*options}}
    chosen = Chosen(**given, options=options)
    return _open(directory, chosen, _read_headers(directory, chosen.base))


def _open(directory: Path, chosen: Chosen, weights: Weights) -> Opened:
    """Everything but the model."""
    state, weights_from = weights
    files = directory if (directory / "config.json").is_file() else weights_from
    config = read_config(files)
    tokenizer = load_tokenizer(_first_with(("tokenizer.json", "vocab.json"), directory, files))
    named, lora = _named(directory) or _named(weights_from), weights_from != directory
    signs = Signs(
        config.raw, tokenizer.get_vocab(), frozenset(state), lora, named.get("family")
    )
    family = pick_family(chosen.family, signs, chosen.options, directory)
    profile = pick_profile(family, chosen.profile or named.get("profile"))
    if profile.name == named.get("profile"):
        chosen = chosen.completed(named["options"])
    preprocessor = _first_with(("preprocessor_config.json",), directory, files)
    images = ImageConfig.from_checkpoint(preprocessor)
    rules = profile.rules
    if chosen.multi_image not in (None, rules.multi_image):
        if rules.multi_image in ("middle", "refuse"):
            raise OptionError(
                f"multi_image={chosen.multi_image!r}: the prompts of {family.family} under the "
                f"profile {profile.name} hold one picture; leave it out"
            )
        rules = replace(rules, multi_image=chosen.multi_image)
    if chosen.pictures is not None:
        rules = replace(rules, pictures=chosen.pictures)
    rules = rules.for_checkpoint(images, chosen.min_pixels, chosen.max_pixels)
    try:
        template = profile.template(tokenizer)
        processor = Processor(
            tokenizer,
            template,
            images,
            rules,
            empty="error" if chosen.empty is None else chosen.empty,
            max_tokens=config.max_position_embeddings,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    _check_patches(config, images, files)
    _check_pads(config, tokenizer, files)
    sources = (directory, files, weights_from)
    return Opened(family, profile, config, tokenizer, processor, sources, chosen.options)


def _load(
    directory: Path, dtype: str | torch.dtype, chosen: Chosen, weights: Weights
) -> BackboneEmbedder:
    """Everything that reads files: a model on the CPU."""
    found, state = _open(directory, chosen, weights), weights[0]
    family, config = found.family, found.config
    if EMBEDDING not in state or state[EMBEDDING].ndim != 2:
        raise CheckpointError(f"{directory}: no {EMBEDDING}; this is not a Qwen2-VL checkpoint")
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    config = family.fit_vocabulary(state, config, found.tokenizer, directory)
    model = _build(family, config, state, found.options, directory)
    model = model.to(dtype=_pick_dtype(dtype, state))
    options = family.Options().replaced(
        {k: v for k, v in found.options.items() if k not in family.build_options}
    )
    model.attach(
        found.tokenizer, found.processor, found.profile, options, chosen.engine, found.sources
    )
    return model


def _named(directory: Path) -> Mapping[str, Any]:
    """Family, profile and options that a checkpoint names itself.

    Raises:
        CheckpointError: they do not exist.
    """
    path = directory / IDENTITY_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    family = json_field(content, str(path), "family", one_of(families()))
    profile = json_field(content, str(path), "profile", one_of(profiles(family)))
    options = json_field(content, str(path), "options", OBJECT, {})
    return {"family": family, "profile": profile, "options": options}


def examine(
    directory: Path, family: str | None = None, profile: str | None = None
) -> BackboneEmbedder:
    """Refuse what ``load`` would refuse about a checkpoint, without reading its weights.

    Their headers are read: names, shapes and types. What only the values tell (NaN), it does not
    find.

    Returns:
        The model that ``load`` would give, with shapes and types for weights.

    Raises:
        CheckpointError, OptionError: as ``load``.
    """
    return _load(directory, "auto", Chosen(family, profile), _read_headers(directory, None))


def _read_headers(directory: Path, base: str | Path | None) -> Weights:
    """As ``_read_weights``, with tensors that have a shape and a type only; a LoRA adds nothing."""
    home, added = directory, []
    if (directory / "adapter_config.json").is_file():
        home = resolve(base or base_named(directory), weights=False)
        added = sorted(directory.glob("*.safetensors"))
    state = {
        published_key(key): torch.empty_like(tensor, device="meta")
        for key, tensor, _ in read_tensors([*weight_files(home), *added])
        if ADAPTER_PREFIX in key or not (".lora_" in key or key.startswith("base_model."))
    }
    return state, home


def resolve(path_or_id: str | Path | None, weights: bool = True, **hub_options: Any) -> Path:
    """Local directory of a checkpoint; a hub id is downloaded (weights, tokenizer, JSON only).

    Args:
        path_or_id: directory, hub id, or None for the small bundled model.
        weights: False downloads everything but the weights.
        hub_options: ``revision``, ``token``, … of ``huggingface_hub.snapshot_download``; None
            counts as absent.

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
            f"{path}: no such directory; give a checkpoint's folder, or a hub id (owner/name)",
            kind=ErrorKind.NOT_FOUND,
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "merges.txt", *["*.safetensors"] * weights]
        given = {name: value for name, value in hub_options.items() if value is not None}
        return Path(snapshot_download(text, allow_patterns=patterns, **given))
    except Exception as error:  # the hub client raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{text}: no such directory. As a hub id it cannot be downloaded either "
            f"({type(error).__name__}: {reason}); check the path, or download the files and give "
            "their folder",
            kind=ErrorKind.NOT_FOUND,
        ) from None


def _read_weights(directory: Path, base: str | Path | None) -> Weights:
    """State dict, LoRA merged, and the directory the base weights came from."""
    if not (directory / "adapter_config.json").is_file():
        if base is not None:
            raise CheckpointError(
                f"{directory}: base= was given, but there is no adapter_config.json to merge"
            )
        return read_state(directory), directory
    base_directory = resolve(base or base_named(directory))
    state = read_state(base_directory)
    merge_lora(state, directory)
    return state, base_directory


def base_named(directory: Path) -> str:
    """The base checkpoint that a LoRA's ``adapter_config.json`` names.

    Raises:
        CheckpointError: it names none.
    """
    path = directory / "adapter_config.json"
    named: str = json_field(read_json(path), str(path), "base_model_name_or_path", TEXT, "")
    if not named:
        raise CheckpointError(
            f"{path}: base_model_name_or_path is empty; pass load(..., base=PATH)"
        )
    return named


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


class _Unfilled(TorchFunctionMode):
    """Random initialisation does nothing: on the meta device it has torch import its compiler.

    That takes two seconds, more than all else before the first embedding of a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _build(
    family: type[BackboneEmbedder],
    config: BackboneConfig,
    state: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    source: Path,
) -> BackboneEmbedder:
    """A model on the loaded tensors; nothing is initialised or copied."""
    given = {name: options[name] for name in family.build_options if name in options}
    try:
        with torch.device("meta"), _Unfilled():
            model = family.build(config, state, HEAD not in state, **given)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
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
        and not family.leaves_out(key, **given)
    ]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no place in the model of config.json: "
            f"{', '.join(unknown[:4])}; the weights belong to another configuration"
        )
    model.load_state_dict({key: state[key] for key in expected}, assign=True)
    return model


def pick_device(device: str | torch.device) -> torch.device:
    """The device meant by ``"auto"``, or the one named.

    Raises:
        OptionError: it does not exist here or is neither a CPU nor a CUDA device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise OptionError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise OptionError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(
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
        raise OptionError(f"dtype must be 'auto', {', '.join(DTYPES)}; got {dtype!r}")
    return chosen


def load_as(
    cls: type[Model], path_or_id: str | Path | None = None, *args: Any, **options: Any
) -> Model:
    """``load`` with the family of a class.

    Raises:
        CheckpointError, OptionError: as ``load``.
    """
    model = load(path_or_id, *args, **{**options, "family": cls.family})
    assert isinstance(model, cls)
    return model
