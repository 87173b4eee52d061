"""Texts, images and videos to the inputs of ``PlumeModel``, with the interface of a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from ume_models.backbone.checkpoint import write_json
from ume_models.backbone.fields import read_json
from ume_models.embedders.loading import open_checkpoint, resolve
from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.interfaces.batches import prepare_batch
from ume_models.interfaces.inputs import make_item
from ume_models.processing import Processor

MODEL_TYPE = "ume_plume"
_HUB = ("revision", "token", "cache_dir", "local_files_only")
# What transformers passes along that has no meaning here.
_IGNORED = (
    "adapter_kwargs",
    "code_revision",
    "config",
    "force_download",
    "low_cpu_mem_usage",
    "output_loading_info",
    "proxies",
    "trust_remote_code",
    "use_fast",
    "use_safetensors",
    "weights_only",
)
# Options that stood beside the others in configurations before there were families.
FLAT = ("mode", "latent_steps", "context", "top_k", "multi_image", "min_pixels", "max_pixels")
_SILENT_CALL = ("add_special_tokens", "padding", "return_attention_mask")


def local_folder(path_or_id: str | Path, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder that arguments of a ``from_pretrained`` mean, and which of them are left."""
    given = {
        name: value
        for name, value in given.items()
        if value is not None and name not in _IGNORED and not name.startswith("_")
    }
    inner = given.pop("subfolder", "")
    hub = {name: given.pop(name) for name in _HUB if name in given}
    return resolve(path_or_id, **hub) / inner, given


def recorded_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``ume_models.load`` that a configuration of ``save_for_auto`` holds."""
    flat = {name: config[name] for name in FLAT if config.get(name) is not None}
    return {**flat, **(config.get("options") or {})}


class PlumeProcessor:
    """Renders the profile's prompt around every input and makes one padded batch.

    Whatever it does not define itself (``decode``, ``pad_token_id``, …) is the tokenizer's.
    Prompts are never cut: a longer one raises.

    Args:
        processor: of the model.
        max_length: longest prompt in tokens.
    """

    padding_side = "left"

    def __init__(self, processor: Processor, max_length: int) -> None:
        self.tokenizer = processor.tokenizer
        self.processor = processor
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> PlumeProcessor:
        """Read the processor of a folder of ``save_for_auto`` or of an official checkpoint.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args: what transformers adds by itself.
            kwargs: options of ``ume_models.load``; hub options.

        Raises:
            CheckpointError: a file is missing or does not fit.
            TypeError, ValueError: an option does not exist, or is out of range.
        """
        folder, options = local_folder(pretrained_model_name_or_path, kwargs)
        config = read_json(folder / "config.json")
        if config.get("model_type") == MODEL_TYPE:
            folder = folder / config.get("checkpoint", "")
            options = {**recorded_options(config), **options}
        found = open_checkpoint(folder, **options)
        return cls(found.processor, found.config.max_position_embeddings)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Write the names of this class; ``PlumeModel.save_pretrained`` writes everything else."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        return write_class_names(target)

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        images: Any = None,
        videos: Any = None,
        *,
        instruction: str = "",
        items: Sequence[Any] | None = None,
        return_tensors: str = "pt",
        truncation: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One batch of inputs of ``PlumeModel``.

        Args:
            text: a string, or a list with one string (or None) per row.
            images: an image, or a list with one per row (or None, or a list of several).
            videos: a list of frames, or a list with one such list (or None) per row.
            instruction: precedes the text of every row, with one space between.
            items: instead of the three: dictionaries as ``Embedder.encode`` takes.
            return_tensors: only ``"pt"``.
            truncation: must not be asked for.
            kwargs: ``padding``, ``add_special_tokens`` and ``return_attention_mask`` are taken and
                change nothing: rows are padded on the left, with a mask.

        Raises:
            ItemError: a row cannot be embedded; its index is named.
            ValueError: an option is not supported.
        """
        unknown = sorted(name for name in kwargs if name not in _SILENT_CALL)
        if unknown or return_tensors != "pt" or truncation not in (None, False, "do_not_truncate"):
            wrong = ", ".join(unknown) or (
                f"return_tensors={return_tensors!r}" if return_tensors != "pt" else "truncation"
            )
            raise ValueError(f"{wrong}: not supported; the batch is in PyTorch and never truncated")
        rows = list(items) if items is not None else _rows(text, images, videos)
        if items is not None and any(given is not None for given in (text, images, videos)):
            raise ValueError("give items, or text, images and videos; not both")
        if not rows:
            raise ValueError("the batch is empty")
        made = [make_item(_instructed(row, instruction), index) for index, row in enumerate(rows)]
        return BatchFeature(prepare_batch(self.processor, made, self.max_length))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs this makes."""
        return list(PROCESSOR_INPUTS)

    def __getattr__(self, name: str) -> Any:
        # Not while the object is being unpickled or copied, before it has a tokenizer.
        if name.startswith("__") or "tokenizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["tokenizer"], name)

    def __len__(self) -> int:
        return len(self.tokenizer)


class PlumeTokenizer(PlumeProcessor):
    """The processor for texts alone, in a tokenizer's place, as pipelines need it.

    Where texts stand behind a constant white image, batches have ``blank_images`` instead of
    pixels: transformers' pipelines cannot batch pixels that a tokenizer makes.
    """

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """``input_ids`` and ``attention_mask`` int64 ``[B, N]``, ``blank_images`` ones ``[B]``.

        Raises:
            ItemError: a text is empty or too long; its index is named.
            ValueError: an option is not supported.
        """
        batch = super().__call__(text, **kwargs)
        batch["blank_images"] = torch.ones(len(batch["input_ids"]), dtype=torch.int64)
        return BatchFeature({name: batch[name] for name in self.model_input_names})

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs this makes."""
        blank = self.processor.template.blank_image
        return ["input_ids", "attention_mask", *["blank_images"] * blank]


def write_class_names(target: Path) -> tuple[str, ...]:
    """Files by which AutoProcessor and AutoTokenizer find these classes once registered."""
    names = {
        "processor_config.json": {"processor_class": PlumeProcessor.__name__},
        "tokenizer_config.json": {"tokenizer_class": PlumeTokenizer.__name__},
    }
    for file, content in names.items():
        write_json(target / file, content)
    return tuple(str(target / file) for file in names)


def _rows(text: Any, images: Any, videos: Any) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {}
    if text is not None:
        columns["text"] = [text] if isinstance(text, str) else list(text)
    if images is not None:
        columns["image"] = list(images) if isinstance(images, (list, tuple)) else [images]
    if videos is not None:
        nested = any(video is None or isinstance(video, (list, tuple)) for video in videos)
        columns["video"] = list(videos) if nested else [list(videos)]
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"text, images and videos have different numbers of rows ({lengths}); write None where "
            "a row has nothing"
        )
    rows = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        if isinstance(row.get("image"), (list, tuple)):
            row["images"] = row.pop("image")
        rows.append(row)
    return rows


def _instructed(row: Any, instruction: str) -> Any:
    if not instruction:
        return row
    row = row if isinstance(row, Mapping) else {"text": row}
    return {"instruction": instruction, **row}
