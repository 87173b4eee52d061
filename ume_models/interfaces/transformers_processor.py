"""Texts, images and videos to the inputs of ``PlumeModel``, with the interface of a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BatchFeature

from ume_models.backbone.checkpoint import write_json
from ume_models.backbone.config import read_json
from ume_models.backbone.tokenizer import load_tokenizer
from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.errors import ItemError
from ume_models.interfaces.batches import pad
from ume_models.interfaces.inputs import make_item
from ume_models.interfaces.locate import checkpoint_folder
from ume_models.processing import ImageConfig, Processor

_HUB = ("revision", "token", "cache_dir", "local_files_only")
# What transformers passes along that has no meaning here.
_IGNORED = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "config",
    "trust_remote_code",
    "use_fast",
)
_LIMITS = ("min_pixels", "max_pixels", "multi_image")
_SILENT_CALL = ("add_special_tokens", "padding", "return_attention_mask")


class PlumeProcessor:
    """Renders the official prompt around every input and makes one padded batch.

    Whatever it does not define itself (``decode``, ``pad_token_id``, …) is the tokenizer's.
    Prompts are never cut: a longer one raises.

    Args:
        tokenizer: the checkpoint's tokenizer.
        images: image geometry and limits.
        multi_image: see ``processing.Processor``.
        max_length: longest prompt in tokens.
    """

    padding_side = "left"

    def __init__(
        self,
        tokenizer: Any,
        images: ImageConfig,
        multi_image: Literal["all", "first"] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = Processor(tokenizer, images, multi_image=multi_image)
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> PlumeProcessor:
        """Read the processor of a folder of ``save_for_auto`` or of an official checkpoint.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args: what transformers adds by itself.
            kwargs: ``min_pixels``, ``max_pixels``, ``multi_image``; hub options.

        Raises:
            CheckpointError: a file is missing or does not fit.
            ValueError: an option does not exist.
        """
        hub = {name: kwargs.pop(name, None) for name in _HUB}
        for name in _IGNORED:
            kwargs.pop(name, None)
        inner = kwargs.pop("subfolder", None) or ""
        unknown = sorted(name for name in kwargs if name not in _LIMITS and name[0] != "_")
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown; known are {', '.join(_LIMITS)}")
        folder = checkpoint_folder(pretrained_model_name_or_path, inner, **hub)
        config = read_json(folder / "config.json")
        chosen = {name: config[name] for name in _LIMITS if config.get(name) is not None}
        chosen.update({name: kwargs[name] for name in _LIMITS if kwargs.get(name) is not None})
        files = folder / str(config.get("checkpoint") or "")
        images = ImageConfig.from_checkpoint(
            files, chosen.get("min_pixels"), chosen.get("max_pixels")
        )
        text = config.get("text_config") or {}
        limit = config.get("max_position_embeddings", text.get("max_position_embeddings"))
        return cls(load_tokenizer(files), images, chosen.get("multi_image"), limit)

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
            items: instead of the three: dictionaries as ``PlumeForEmbedding.encode`` takes.
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
        plans = self.processor.plan(made)
        for plan in plans:
            if self.max_length is not None and plan.num_tokens > self.max_length:
                raise ItemError(
                    f"the prompt has {plan.num_tokens} tokens, but the model holds "
                    f"{self.max_length}; shorten the text, send fewer frames or lower max_pixels",
                    plan.index,
                )
        return BatchFeature(pad([self.processor.load(plan) for plan in plans], self.tokenizer))

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

    Batches have ``blank_images`` instead of pixels: texts stand behind a constant white image, and
    transformers' pipelines cannot batch pixels that a tokenizer makes.
    """

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """``input_ids`` and ``attention_mask`` int64 ``[B, N]``, ``blank_images`` ones ``[B]``.

        Raises:
            ItemError: a text is empty or too long; its index is named.
            ValueError: an option is not supported.
        """
        batch = super().__call__(text, **kwargs)
        for name in ("pixel_values", "image_grid_thw"):
            del batch[name]
        batch["blank_images"] = torch.ones(batch["input_ids"].shape[0], dtype=torch.int64)
        return batch

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs this makes."""
        return ["input_ids", "attention_mask", "blank_images"]


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
