"""The contract: what encoding, storing, evaluating and serving know of a model.

A family implements ``Embedder`` (``embedders/base.py`` does nearly all of it for Qwen2-VL
backbones); everything above knows this module alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import torch

from ume_models.errors import UnknownOptionError
from ume_models.processing import PreparedItem, Processor
from ume_models.profile import Profile
from ume_models.rollout.engine import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Options = TypeVar("Options", bound="EmbedOptions")


@dataclass(frozen=True)
class EmbedOptions:
    """Options of one family's embeddings, passed whole; a family without any uses this class."""

    def described(self) -> dict[str, Any]:
        """What determines the numbers, JSON-serialisable: for manifests, cache keys and schemas."""
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(cls))

    def replaced(self: Options, given: Mapping[str, Any]) -> Options:
        """These options with some replaced; None keeps what is here.

        Raises:
            UnknownOptionError: an option does not exist; those that do are listed.
            OptionError: a value is out of range.
        """
        known = self.names()
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            raise UnknownOptionError(
                f"{', '.join(unknown)}: no such option; this model has {', '.join(known) or 'none'}"
            )
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(self, **chosen) if chosen else self


class Embedder(ABC):
    """Items to unit-norm rows in one space.

    Attributes:
        family: name of the family, as ``load(…, family=…)`` takes it.
        Options: class of its options.
        asymmetric: an item with an instruction is a query, one without a candidate.
        options: defaults of this model.
        profile: the convention under which it embeds.
        processor: items to inputs, under that convention.
        tokenizer: the checkpoint's.
        sources: folders its files came from, first match first.
    """

    family: ClassVar[str]
    Options: ClassVar[type[EmbedOptions]] = EmbedOptions
    asymmetric: ClassVar[bool] = False
    options: EmbedOptions
    profile: Profile
    processor: Processor
    tokenizer: PreTrainedTokenizerBase
    sources: tuple[Path, ...]

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width D of an embedding."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """Tokens of the longest row, with everything that follows its prompt."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that makes two loaded models give different embeddings.

        Weights, architecture, tokenizer and profile; it reads every weight at every access.
        """

    @property
    @abstractmethod
    def load_options(self) -> dict[str, Any]:
        """Options with which ``ume_models.load`` gives this model again from its checkpoint."""

    @abstractmethod
    def described(self, options: EmbedOptions) -> dict[str, Any]:
        """What determines the numbers besides weights and items; JSON-serialisable."""

    @abstractmethod
    def reserve(self, options: EmbedOptions) -> int:
        """Tokens that a row grows by beyond its prompt, at most."""

    @overload
    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = ...,
        pixel_values: torch.Tensor | None = ...,
        image_grid_thw: torch.Tensor | None = ...,
        pixel_values_videos: torch.Tensor | None = ...,
        video_grid_thw: torch.Tensor | None = ...,
        *,
        return_trace: Literal[False] = ...,
        **options: Any,
    ) -> torch.Tensor: ...

    @overload
    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = ...,
        pixel_values: torch.Tensor | None = ...,
        image_grid_thw: torch.Tensor | None = ...,
        pixel_values_videos: torch.Tensor | None = ...,
        video_grid_thw: torch.Tensor | None = ...,
        *,
        return_trace: Literal[True],
        **options: Any,
    ) -> tuple[torch.Tensor, Trace]: ...

    @abstractmethod
    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        *,
        return_trace: bool = False,
        **options: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, Trace]:
        """Embeddings of a padded batch of rendered prompts in Hugging Face processor layout.

        Args:
            input_ids: int64 ``[B, N]``, padded on either side; visual tokens expanded. What the
                family forces after a prompt is appended where it is missing.
            attention_mask: ``[B, N]``, 1 for real tokens; default all.
            pixel_values: ``[P, C·T·p·p]`` patches of all images of the batch, in order.
            image_grid_thw: ``[images, 3]``.
            pixel_values_videos, video_grid_thw: the same for videos.
            return_trace: also return the states behind the embeddings.
            options: of the family, replacing the model's defaults. ``mm_token_type_ids``, which
                processors of transformers 5 add, is ignored.

        Returns:
            Unit-norm float32 ``[B, D]`` on the model's device, and the trace if asked for.

        Raises:
            ValueError: shapes, grids and tokens do not fit together; the row is named.
            CapacityError: a prompt exceeds the model's positions.
            StructureError: a layer is wrapped, hooked or replaced, which would be lost.
        """

    @abstractmethod
    def embed_prepared(
        self, rows: Sequence[PreparedItem], options: EmbedOptions | None = None
    ) -> torch.Tensor:
        """Embeddings ``[B, D]`` of items the processor prepared; no padding is involved."""

    def writes(self, options: EmbedOptions) -> bool:
        """Whether it reasons in words, so that the traces are of ``TokenTrace``."""
        return False

    @abstractmethod
    def embed_traced(
        self, rows: Sequence[PreparedItem], options: EmbedOptions | None = None
    ) -> tuple[torch.Tensor, Trace]:
        """``embed_prepared``, and what lies behind the embeddings."""

    @abstractmethod
    def prepare(self, items: Iterable[Any]) -> list[PreparedItem]:
        """One object per item in Hugging Face processor layout, before forced tokens.

        ``input_ids`` int64 ``[T]``; ``pixel_values``, ``image_grid_thw``, ``pixel_values_videos``
        and ``video_grid_thw`` where the item has them.

        Raises:
            ItemError: an item cannot be embedded; it is named.
        """

    @abstractmethod
    def encode(self, items: Iterable[Any], **options: Any) -> torch.Tensor:
        """Embeddings float32 ``[N, D]`` (CPU) of items; see ``ume_models.encode.encode``."""

    @abstractmethod
    def free_memory(self) -> None:
        """Give back what is held for batches; the next one allocates again."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Write a checkpoint that ``ume_models.load`` opens as this family and profile."""
