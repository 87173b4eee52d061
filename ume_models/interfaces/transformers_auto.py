"""PLUME behind transformers' Auto classes and its feature-extraction pipeline.

After :func:`register`, ``AutoConfig``, ``AutoModel``, ``AutoProcessor``, ``AutoTokenizer`` and
``pipeline("feature-extraction", folder)`` understand folders written by :func:`save_for_auto`.
Published checkpoints name another model type, so their configuration is given along:
``AutoModel.from_pretrained(path, config=PlumeConfig.from_pretrained(path))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ume_models.backbone.checkpoint import write_json
from ume_models.backbone.config import FAMILIES, parse_config
from ume_models.embedders.loading import load
from ume_models.embedders.plume import Mode, PlumeForEmbedding
from ume_models.errors import UmeError
from ume_models.interfaces.locate import checkpoint_folder
from ume_models.interfaces.transformers_processor import (
    PlumeProcessor,
    PlumeTokenizer,
    write_class_names,
)

MODEL_TYPE = "ume_plume"
# The official checkpoint inside an exported folder.
CHECKPOINT = "plume"
_HUB = ("revision", "token", "cache_dir", "local_files_only")
# What transformers passes along that has no meaning here.
_IGNORED = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "force_download",
    "low_cpu_mem_usage",
    "output_loading_info",
    "proxies",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)


class PlumeConfig(PretrainedConfig):
    """Where the checkpoint lies and how it embeds.

    Args:
        checkpoint: folder of the official checkpoint inside this one; ``""`` is this one.
        hidden_size, vocab_size, max_position_embeddings: of the checkpoint.
        mode: ``"gen"``, ``"disc"`` or ``"last"``.
        latent_steps, context, top_k, multi_image, min_pixels, max_pixels: see ``ume_models.load``.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        checkpoint: str = "",
        hidden_size: int = 1536,
        vocab_size: int = 151936,
        max_position_embeddings: int = 32768,
        mode: Mode = "gen",
        latent_steps: int = 8,
        context: str = "disc",
        top_k: int = 2,
        multi_image: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.checkpoint = checkpoint
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.mode = mode
        self.latent_steps = latent_steps
        self.context = context
        self.multi_image = multi_image
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        super().__init__(**kwargs)
        # A generation option of the same name is taken out of kwargs by older versions.
        self.top_k = top_k

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Content of ``config.json``; that of an official checkpoint is translated."""
        raw, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if raw.get("model_type") in FAMILIES:
            raw = _translated(raw, str(pretrained_model_name_or_path), "")
        return raw, rest

    def load_options(self) -> dict[str, Any]:
        """Arguments of ``ume_models.load``."""
        names = ("latent_steps", "context", "top_k", "multi_image", "min_pixels", "max_pixels")
        return {name: getattr(self, name) for name in names}


@dataclass
class PlumeOutput(ModelOutput):
    """Output of :class:`PlumeModel`.

    Attributes:
        last_hidden_state: ``[B, 1, D]``, the embedding as a sequence of length one: what
            pipelines and pooling code read.
        embeddings: unit-norm float32 ``[B, D]``.
    """

    last_hidden_state: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


class PlumeModel(PreTrainedModel):
    """A PLUME model as a transformers module, for inference: it computes no gradients.

    Made by ``from_pretrained``; ``plume`` is the ``PlumeForEmbedding`` inside.
    """

    config_class = PlumeConfig
    base_model_prefix = "plume"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: PlumeConfig, model: PlumeForEmbedding | None = None) -> None:
        if model is None:
            raise UmeError(
                "a PlumeModel needs weights: use AutoModel.from_pretrained or "
                "PlumeModel.from_pretrained"
            )
        super().__init__(config)
        self.plume = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: PlumeConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PlumeModel:
        """Load a folder of :func:`save_for_auto` or an official checkpoint.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args: not used by any loader; must be empty.
            config: default: the one in the folder.
            dtype, torch_dtype: default: the checkpoint's.
            device_map: ``None`` (CPU), ``"auto"``, one device, or ``{"": device}``.
            kwargs: fields of the configuration; hub options; what transformers adds by itself.

        Raises:
            CheckpointError: the checkpoint does not load.
            ValueError: an argument is not supported.
        """
        hub = {name: kwargs.pop(name, None) for name in _HUB}
        for name in _IGNORED:
            kwargs.pop(name, None)
        inner = kwargs.pop("subfolder", None) or ""
        if config is None:
            fields = {name: kwargs.pop(name) for name in list(kwargs) if name in _FIELDS}
            given = {name: value for name, value in hub.items() if value is not None}
            config = PlumeConfig.from_pretrained(
                pretrained_model_name_or_path, subfolder=inner, **given, **fields
            )
        left = sorted(name for name, value in kwargs.items() if value is not None)
        if args or left:
            raise ValueError(
                f"{', '.join(left) or 'positional arguments'}: not supported by {cls.__name__}; "
                f"it takes dtype, device_map and {', '.join(_FIELDS)}"
            )
        if not isinstance(config, PlumeConfig):
            raise ValueError(
                f"config is a {type(config).__name__}; give PlumeConfig.from_pretrained(path)"
            )
        folder = checkpoint_folder(pretrained_model_name_or_path, inner, **hub)
        folder = folder / config.checkpoint if config.checkpoint else folder
        chosen = dtype if dtype is not None else torch_dtype
        model = load(
            folder,
            _device(device_map),
            "auto" if chosen is None else chosen,
            **config.load_options(),
        )
        made = cls(config, model)
        made.eval()
        return made

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder for the Auto classes, see :func:`save_for_auto`; always safetensors."""
        if kwargs.get("safe_serialization") is False:
            raise ValueError("only safetensors are written; leave safe_serialization at True")
        save_for_auto(self.plume, save_directory, mode=self.config.mode)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        blank_images: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> PlumeOutput | tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of a batch that the processor made.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_thw, pixel_values_videos,
            video_grid_thw, mm_token_type_ids: as ``PlumeForEmbedding.embed``.
            blank_images: ``[B]``, from ``PlumeTokenizer``: every image is the constant white one.
            return_dict: False for a plain tuple.
            options: ``mode``, ``latent_steps``, … of ``PlumeForEmbedding.embed``.

        Raises:
            ValueError: a row is not a PLUME prompt, or shapes do not fit together.
        """
        anchors = (input_ids == self.plume.tokens.disc_emb).any(dim=-1)
        if not bool(anchors.all()):
            row = int((~anchors).nonzero()[0])
            raise ValueError(
                f"row {row} has no <disc_emb>: it is not a PLUME prompt. Make inputs with "
                "AutoProcessor (PlumeProcessor); a plain tokenizer leaves the prompt out"
            )
        if blank_images is not None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ValueError("give pixels or blank_images, not both")
            pixels, grid = self.plume.processor.blank_image
            pixel_values = pixels.repeat(len(input_ids), 1)
            image_grid_thw = torch.tensor([grid] * len(input_ids))
        embeddings = self.plume.embed(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            **{"mode": self.config.mode, **options},
        )
        output = PlumeOutput(last_hidden_state=embeddings[:, None], embeddings=embeddings)
        return output.to_tuple() if return_dict is False else output


_FIELDS = ("mode", "latent_steps", "context", "top_k", "multi_image", "min_pixels", "max_pixels")


def register() -> None:
    """Make the Auto classes of this process know PLUME; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, PlumeConfig, exist_ok=True)
    AutoModel.register(PlumeConfig, PlumeModel, exist_ok=True)
    AutoProcessor.register(PlumeConfig, PlumeProcessor, exist_ok=True)
    AutoTokenizer.register(PlumeConfig, fast_tokenizer_class=PlumeTokenizer, exist_ok=True)


def save_for_auto(
    model: PlumeForEmbedding | str | Path | None,
    directory: str | Path,
    *,
    mode: Mode = "gen",
    **load_options: Any,
) -> Path:
    """Write a folder that ``AutoModel.from_pretrained`` opens after :func:`register`.

    It holds the official checkpoint unchanged in the subfolder ``plume``, which
    ``ume_models.load`` and the official code read, and a few JSON files for the Auto classes.

    Args:
        model: a loaded model, or a folder or hub id, or None for the bundled one.
        directory: created if needed.
        mode: default mode of the exported model.
        load_options: options of ``ume_models.load``; ``latent_steps``, ``context``, ``top_k``,
            ``multi_image`` and pixel limits are kept in the configuration.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: the checkpoint does not load.
        ValueError: ``directory`` is the checkpoint itself.
    """
    if isinstance(model, PlumeForEmbedding):
        if load_options:
            raise TypeError(f"a loaded model takes no load options, got {sorted(load_options)}")
    else:
        model = load(model, **{"device": "cpu", **load_options})
    target = Path(directory)
    if any(target.resolve() == source.resolve() for source in model.sources):
        raise ValueError(f"{target} is the checkpoint itself; give another folder")
    model.save_pretrained(target / CHECKPOINT)
    raw = _translated(dict(model.config.raw), str(target), CHECKPOINT)
    adapter = model.latent_moe_transition
    raw.update(
        architectures=["PlumeModel"],
        mode=mode,
        latent_steps=model.settings.latent_steps,
        context=model.settings.context,
        multi_image=model.processor.multi_image,
        min_pixels=model.processor.config.min_pixels,
        max_pixels=model.processor.config.max_pixels,
    )
    if adapter is not None:
        raw["top_k"] = adapter.top_k
    write_json(target / "config.json", raw)
    write_class_names(target)
    return target


def _translated(raw: dict[str, Any], source: str, checkpoint: str) -> dict[str, Any]:
    """Our configuration for the content of an official ``config.json``."""
    config = parse_config(raw, source)
    return {
        "model_type": MODEL_TYPE,
        "checkpoint": checkpoint,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _device(device_map: Any) -> str:
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(f"device_map={device_map!r}: the model stays on one device")
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"device_map={device_map!r}: the model stays on one device")
    return str(device_map)
