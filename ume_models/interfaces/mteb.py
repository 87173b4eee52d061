"""Any model as an encoder for mteb, for text, image and video tasks.

``mteb.evaluate(MtebEncoder(folder), tasks)``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ume_models.embedder import Embedder
from ume_models.embedders.loading import resolve
from ume_models.encode import encode
from ume_models.errors import ItemError
from ume_models.interfaces.inputs import make_item
from ume_models.interfaces.models import Source, open_model
from ume_models.processing.items import Item

Array = np.ndarray | torch.Tensor
Instructions = Mapping[str, str] | Callable[[Any, str | None], str | None] | None

_COLUMNS = ("text", "image", "video")
# Items held at once: enough to sort by length, few enough decoded images to fit into memory.
_MAX_TEXTS = 4096
_MAX_MEDIA = 256


class MtebEncoder:
    """An encoder as mteb 2 asks for (``EncoderProtocol``); mteb 1 may call it with a list of texts.

    Args:
        model, options: see ``interfaces.models.open_model``.
        revision: hub revision, and the revision in the results; default: a hash of the weights.
        device: where to load the model; default: a GPU where there is one.
        instructions: what precedes the text, by ``"TASK-query"``, ``"TASK-document"``, ``"TASK"``
            (a task's name, or its type such as ``"Retrieval"``), ``"query"`` or ``"document"``;
            the most specific one counts. Or a function of (task metadata, ``"query"`` |
            ``"document"`` | None). Default: the prompt that the task itself defines, if any.
        batch_tokens: see ``ume_models.encode``; mteb's ``batch_size`` only says how items arrive.
        video_frames: frames taken from a video, evenly; officially 8.
        name: model name in the results, ``"organisation/name"``.

    Raises:
        CheckpointError: the checkpoint does not load.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        model: Source = None,
        revision: str | None = None,
        *,
        device: str | None = None,
        instructions: Instructions = None,
        batch_tokens: int | None = None,
        video_frames: int = 8,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if device is not None:
            options["device"] = device
        source = model if isinstance(model, Embedder) else resolve(model, revision=revision)
        self.model, self.embed_options = open_model(source, options)
        if name is None:
            text = model if isinstance(model, str) else ""
            is_id = text.count("/") == 1 and not Path(text).expanduser().is_dir()
            name = text if is_id else f"ume-models/{self.model.sources[0].resolve().name}"
        self.name = name
        self.revision = revision
        self.instructions = instructions
        self.batch_tokens = batch_tokens
        self.video_frames = video_frames

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        task_metadata: Any = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        prompt_type: Any = None,
        task_name: str | None = None,
        show_progress_bar: bool | None = False,
        precision: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Unit-norm float32 ``[N, D]`` of a data loader of mteb's batches, or of texts.

        Texts, images and videos of a batch belong together row by row. ``hf_split``,
        ``hf_subset`` and ``batch_size`` change nothing.

        Raises:
            ItemError: an item cannot be embedded, such as one with audio; ``index`` is its
                position among all inputs.
            ValueError: ``precision`` other than float32.
        """
        if precision not in (None, "float32"):
            raise ValueError(f"precision={precision!r} is not supported; embeddings are float32")
        self._sample_videos(inputs)
        instruction = self.instruction(task_metadata, prompt_type, task_name)
        parts = [torch.empty(0, self.model.hidden_size, device="cpu")]
        options = {**vars(self.embed_options), "batch_tokens": self.batch_tokens}
        start = 0
        for items in _groups(_with_instruction(inputs, instruction)):
            try:
                part = encode(self.model, items, progress=bool(show_progress_bar), **options)
            except ItemError as error:
                # its index is the one in the group
                index = None if error.index is None else start + error.index
                raise error.at(index) from error
            parts.append(part)
            start += len(items)
        return torch.cat(parts).numpy()

    def instruction(
        self, task_metadata: Any, prompt_type: Any = None, task_name: str | None = None
    ) -> str:
        """What precedes the text of a task's queries or documents; empty for nothing."""
        side = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        side = "document" if side == "passage" else side
        if callable(self.instructions):
            return self.instructions(task_metadata, side) or ""
        prompt = getattr(task_metadata, "prompt", None)
        if self.instructions is not None:
            names = (
                getattr(task_metadata, "name", task_name),
                getattr(task_metadata, "type", None),
            )
            for name in (*names, None):
                for key in (f"{name}-{side}", name) if name else (side,):
                    if key is not None and key in self.instructions:
                        return self.instructions[key]
        if isinstance(prompt, Mapping):
            return (prompt.get(side) or "") if side else ""
        return prompt or ""

    def similarity(self, embeddings1: Array, embeddings2: Array) -> torch.Tensor:
        """Cosine of every pair, float32 ``[N, M]``."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> torch.Tensor:
        """Cosine of row i with row i, float32 ``[N]``."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """``mteb.models.ModelMeta``; its revision is a hash of the weights unless one was given."""
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError as error:
            raise ImportError("this needs mteb: pip install 'mteb>=2'") from error
        model = self.model
        module = model if isinstance(model, nn.Module) else nn.Module()
        weights = list(module.parameters())
        tables = [m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding)]
        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.revision or model.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=sum(p.numel() for p in weights),
            n_embedding_parameters=max(tables, default=0),
            memory_usage_mb=sum(p.nbytes for p in weights) / 2**20,
            max_tokens=model.max_positions,
            embed_dim=model.hidden_size,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image", "video"],
            experiment_kwargs={"profile": model.profile.name, **self.embed_options.described()},
        )

    def _sample_videos(self, inputs: Any) -> None:
        """Have a loader of encoded videos decode a few frames of each, as mteb's own models do."""
        features = getattr(getattr(inputs, "dataset", None), "features", None) or {}
        if "video" in features:
            from mteb.models.modality_collators import VideoCollator

            inputs.collate_fn = VideoCollator(
                target_sampling_rate=16000, num_frames=self.video_frames
            )


def _with_instruction(inputs: Iterable[Any], instruction: str) -> Iterator[Item]:
    if isinstance(inputs, (str, bytes, Mapping)):
        raise TypeError("inputs must be a data loader of batches or a list of texts")
    index = 0
    for batch in inputs:
        for row in _rows(batch, index):
            if instruction:
                row = {"instruction": instruction, **row}
            yield make_item(row, index)
            index += 1


def _rows(batch: Any, start: int) -> Iterator[dict[str, Any]]:
    """The rows of one batch of mteb; a bare string is a batch of one text."""
    if isinstance(batch, str):
        yield {"text": batch}
        return
    if not isinstance(batch, Mapping):
        raise ItemError(
            f"is a {type(batch).__name__}; expected batches such as {{'text': […], 'image': […]}}",
            start,
        )
    if any(sound is not None for sound in batch.get("audio") or ()):
        raise ItemError("has audio, which this model does not embed; choose other tasks", start)
    columns = {name: batch[name] for name in _COLUMNS if batch.get(name) is not None}
    if not columns:
        known = ", ".join(sorted(str(name) for name in batch))
        raise ItemError(f"has no text, image or video, only {known}", start)
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        if isinstance(row.get("image"), (list, tuple)):
            row["images"] = row.pop("image")
        yield row


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    group: list[Item] = []
    media = 0
    for item in items:
        group.append(item)
        media += len(item.images) + len(item.video or ())
        if len(group) == _MAX_TEXTS or media >= _MAX_MEDIA:
            yield group
            group, media = [], 0
    if group:
        yield group


def _unit(embeddings: Array) -> torch.Tensor:
    tensor = torch.as_tensor(
        np.asarray(embeddings) if not torch.is_tensor(embeddings) else embeddings
    )
    return F.normalize(torch.atleast_2d(tensor.float()), dim=-1)
