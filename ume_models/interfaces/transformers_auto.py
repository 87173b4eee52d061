"""Any model behind transformers' Auto classes and its feature-extraction pipeline.

After :func:`register`, ``AutoConfig``, ``AutoModel``, ``AutoProcessor``, ``AutoTokenizer`` and
``pipeline("feature-extraction", folder)`` understand folders written by :func:`save_for_auto`.
Published checkpoints name another model type, so their configuration is given along:
``AutoModel.from_pretrained(path, config=PlumeConfig.from_pretrained(path))``. The classes bear the
name of the first family, by which transformers finds them in folders written earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from ume_models.embedder import Embedder
from ume_models.errors import UmeError
from ume_models.interfaces.models import Source, load_options, open_model
from ume_models.interfaces.transformers_processor import (
    FLAT,
    MODEL_TYPE,
    PlumeProcessor,
    PlumeTokenizer,
    local_folder,
    recorded_options,
    write_class_names,
)

# The official checkpoint inside an exported folder.
CHECKPOINT = "plume"


class PlumeConfig(PretrainedConfig):
    """Where the checkpoint lies and how it embeds.

    Args:
        checkpoint: folder of the official checkpoint inside this one; ``""`` is this one.
        hidden_size, vocab_size, max_position_embeddings: of the checkpoint.
        options: of ``ume_models.load``.
        kwargs: of every configuration; options of PLUME may stand among them.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        checkpoint: str = "",
        hidden_size: int = 1536,
        vocab_size: int = 151936,
        max_position_embeddings: int = 32768,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.checkpoint = checkpoint
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.options = recorded_options({**kwargs, "options": options})
        super().__init__(**{name: kwargs[name] for name in kwargs if name not in FLAT})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # before an attribute of the same name, such as generation's top_k, takes them
        given = {name: kwargs.pop(name) for name in FLAT if name in kwargs}
        options = {**recorded_options(config_dict), **given}
        return super().from_dict({**config_dict, "options": options}, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Content of ``config.json``; that of an official checkpoint is translated."""
        raw, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if raw.get("model_type") in FAMILIES:
            config = parse_config(raw, str(pretrained_model_name_or_path))
            names = ("hidden_size", "vocab_size", "max_position_embeddings")
            raw = {"model_type": MODEL_TYPE, **{name: getattr(config, name) for name in names}}
        return raw, rest


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
    """A model of any family as a transformers module, for inference: it computes no gradients.

    Made by ``from_pretrained``; ``embedder`` is the model inside.
    """

    config_class = PlumeConfig
    base_model_prefix = "embedder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    plume = property(lambda self: self.embedder)  # the older name

    def __init__(self, config: PlumeConfig, model: Embedder | None = None) -> None:
        if model is None:
            raise UmeError(
                "a PlumeModel needs weights: use AutoModel.from_pretrained or "
                "PlumeModel.from_pretrained"
            )
        super().__init__(config)
        self.embedder = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PlumeConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> PlumeModel:
        """Load a folder of :func:`save_for_auto` or an official checkpoint.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            config: default: the one in the folder.
            dtype, torch_dtype: default: the checkpoint's.
            device_map: ``None`` (CPU), ``"auto"``, one device, or ``{"": device}``.
            kwargs: options of ``ume_models.load``; hub options; what transformers adds by itself.

        Raises:
            CheckpointError: the checkpoint does not load.
            TypeError, ValueError: an argument is not supported, or is out of range.
        """
        folder, options = local_folder(pretrained_model_name_or_path, kwargs)
        config = PlumeConfig.from_pretrained(folder) if config is None else config
        if not isinstance(config, PlumeConfig):
            raise ValueError(
                f"config is a {type(config).__name__}; give PlumeConfig.from_pretrained(path)"
            )
        chosen = dtype if dtype is not None else torch_dtype
        options = {**config.options, "device": _device(device_map), **options}
        options["dtype"] = "auto" if chosen is None else chosen
        model, _ = open_model(folder / config.checkpoint, options)
        config.options = model.load_options
        return cls(config, model).eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder for the Auto classes, see :func:`save_for_auto`; always safetensors."""
        if kwargs.get("safe_serialization") is False:
            raise ValueError("only safetensors are written; leave safe_serialization at True")
        save_for_auto(self.embedder, save_directory)

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
            video_grid_thw, mm_token_type_ids: as ``Embedder.embed``.
            blank_images: ``[B]``, from ``PlumeTokenizer``: every row has the constant white image.
            return_dict: False for a plain tuple.
            options: of the model's family.

        Raises:
            ValueError: a row is not a prompt of the profile, or shapes do not fit together.
        """
        self._check_prompts(input_ids)
        if blank_images is not None:
            if pixel_values is not None or pixel_values_videos is not None:
                raise ValueError("give pixels or blank_images, not both")
            pixels, grid = self.embedder.processor.blank_image
            pixel_values = pixels.repeat(len(input_ids), 1)
            image_grid_thw = torch.tensor([grid] * len(input_ids))
        embeddings = self.embedder.embed(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            **options,
        )
        output = PlumeOutput(last_hidden_state=embeddings[:, None], embeddings=embeddings)
        return output.to_tuple() if return_dict is False else output

    def _check_prompts(self, input_ids: torch.Tensor) -> None:
        """Every prompt has the added tokens that a text's prompt has, such as those of turns."""
        prompt = str(self.embedder.processor.template.render((), "", "a"))
        added = self.embedder.tokenizer.get_added_vocab()
        for token, index in ((t, i) for t, i in added.items() if t in prompt):
            found = (input_ids == index).any(dim=-1)
            if not bool(found.all()):
                raise ValueError(
                    f"row {int((~found).nonzero()[0])} has no {token}, which is in every prompt of "
                    f"the profile {self.embedder.profile.name}. Make inputs with AutoProcessor; a "
                    "plain tokenizer leaves the prompt out"
                )


def register() -> None:
    """Make the Auto classes of this process know these models; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, PlumeConfig, exist_ok=True)
    AutoModel.register(PlumeConfig, PlumeModel, exist_ok=True)
    AutoProcessor.register(PlumeConfig, PlumeProcessor, exist_ok=True)
    AutoTokenizer.register(PlumeConfig, fast_tokenizer_class=PlumeTokenizer, exist_ok=True)


def save_for_auto(model: Source, directory: str | Path, **options: Any) -> Path:
    """Write a folder that ``AutoModel.from_pretrained`` opens after :func:`register`.

    It holds the official checkpoint unchanged in the subfolder ``plume``, which
    ``ume_models.load`` and the official code read, and a few JSON files for the Auto classes.

    Args:
        model, options: see ``interfaces.models.open_model``; kept in the configuration.
        directory: created if needed.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: the checkpoint does not load.
        ValueError: ``directory`` is the checkpoint itself.
    """
    if not isinstance(model, Embedder):
        options = {"device": "cpu", **options}
    opened, chosen = open_model(model, options)
    target = Path(directory)
    if any(target.resolve() == source.resolve() for source in opened.sources):
        raise ValueError(f"{target} is the checkpoint itself; give another folder")
    opened.save_pretrained(target / CHECKPOINT)
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [PlumeModel.__name__],
        "checkpoint": CHECKPOINT,
        "hidden_size": opened.hidden_size,
        "vocab_size": len(opened.tokenizer),
        "max_position_embeddings": opened.max_positions,
        "options": load_options(opened, chosen),
    }
    write_json(target / "config.json", config)
    write_class_names(target)
    return target


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
