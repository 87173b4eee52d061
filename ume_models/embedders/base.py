"""Everything that embedders on a Qwen2-VL or Qwen2.5-VL backbone have in common.

A family adds its prompts, its profiles and, where one pass is not all, its policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from ume_models.atomic import write_atomically
from ume_models.backbone.checkpoint import write_json, write_state
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.structure import Structure
from ume_models.backbone.text import TextModel
from ume_models.backbone.tokenizer import splitting_rules
from ume_models.backbone.transformers_model import build_transformers_model
from ume_models.backbone.vision import VisionModel
from ume_models.embedder import Embedder, EmbedOptions
from ume_models.embedders.library_files import write_identity, write_library_files
from ume_models.embedders.reference import SinglePassReference
from ume_models.embedders.rows import rows_of_batch
from ume_models.encode import encode
from ume_models.errors import CheckpointError, ErrorKind, ItemError, OptionError
from ume_models.processing import PreparedItem, Processor
from ume_models.profile import BEFORE_PROFILES, Profile
from ume_models.rollout.engine import Engine, Policy, Trace, unit_norm
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.sequence import Visual, build_sequence
from ume_models.rollout.single_pass import SinglePass
from ume_models.rollout.tokens import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EngineName = Literal["fast", "reference"]
Row = tuple[np.ndarray, list[Visual]]

# Written back as they were found; they are the tokenizer's and the processor's, not ours.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)

@dataclass(frozen=True)
class Signs:
    """What a checkpoint looks like, for families to recognise theirs.

    Attributes:
        config: content of ``config.json``.
        vocabulary: the tokenizer's tokens.
        tensors: names of the weights.
        lora: they were merged from a LoRA folder.
        named: the family that the checkpoint names itself, if it does.
    """

    config: Mapping[str, Any]
    vocabulary: Mapping[str, int]
    tensors: frozenset[str]
    lora: bool
    named: str | None


class BackboneEmbedder(Embedder, nn.Module):
    """One state of one pass over a prompt, unless a family says otherwise.

    Its state dict is the official checkpoint: ``model.*``, ``visual.*``, and ``lm_head.weight``
    where embeddings are not tied. Made by ``ume_models.load`` or ``from_pretrained``.

    Class attributes of a family:
        profiles: its conventions by name; the first one is the default.
        build_options: options of ``load`` that decide how the model is built.
    """

    profiles: ClassVar[Mapping[str, Profile]]
    build_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: BackboneConfig, tied: bool) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        self.visual = VisionModel(config.vision)
        width, rows = config.hidden_size, config.vocab_size
        self.lm_head = None if tied else nn.Linear(width, rows, bias=False)
        self.engine: EngineName = "fast"
        self.options = self.Options()
        self._rollout: Engine | None = None
        self._reference: tuple[int, Any] | None = None

    # -- for families -----------------------------------------------------------------------

    @classmethod
    def fits(cls, signs: Signs) -> bool:
        """Whether a checkpoint may be one of this family."""
        raise NotImplementedError

    @classmethod
    def owns(cls, signs: Signs) -> bool:
        """Whether a checkpoint can be no other family's."""
        return False

    @classmethod
    def fit_vocabulary(
        cls,
        state: dict[str, torch.Tensor],
        config: BackboneConfig,
        tokenizer: PreTrainedTokenizerBase,
        source: Path,
    ) -> BackboneConfig:
        """The configuration with the rows that the embedding has, which need not be the tokens'.

        Raises:
            CheckpointError: there are more tokens than rows.
        """
        rows = state["model.embed_tokens.weight"].shape[0]
        largest = max(tokenizer.get_vocab().values())
        if rows <= largest:
            raise CheckpointError(
                f"{source}: the tokenizer's ids go up to {largest} but the embedding has {rows} "
                "rows; the tokenizer belongs to another checkpoint"
            )
        return replace(config, vocab_size=rows)

    @classmethod
    def build(
        cls, config: BackboneConfig, state: Mapping[str, torch.Tensor], tied: bool, **options: Any
    ) -> Self:
        """A model for these weights, which are assigned to it afterwards."""
        return cls(config, tied)

    @classmethod
    def leaves_out(cls, key: str, **options: Any) -> bool:
        """Whether a tensor of the checkpoint has no place in the model under these options."""
        return False

    def policy(self, options: EmbedOptions) -> Policy:
        """What follows the prefill."""
        return SinglePass(self._tapped)

    def forced(self, options: EmbedOptions) -> tuple[int, ...]:
        """Ids appended to prompts that do not end with them."""
        return self._forced

    def _make_reference(self, module: Any) -> Any:
        return SinglePassReference(self.config, module)

    def _hidden(
        self, batch: Sequence[Prompt], options: EmbedOptions, trace: bool
    ) -> tuple[torch.Tensor, Trace | None]:
        """States ``[B, D]`` after the final norm, before normalisation."""
        if self.engine == "fast":
            return self.rollout.run(batch, self.policy(options), trace)
        reference: SinglePassReference = self.reference
        policy = self.policy(options)
        if isinstance(policy, Token):
            found = [reference.write(prompt, policy) for prompt in batch]
            hidden = torch.stack([state for state, _ in found])
            written = [ids for _, ids in found]
            return hidden, policy.traced(hidden, written, batch) if trace else None
        states = [reference.hidden_at(prompt, policy.reads(prompt)[0]) for prompt in batch]
        hidden = torch.stack(states)
        return hidden, Trace(hidden.float().cpu()) if trace else None

    def _identity(self) -> dict[str, Any]:
        """What a fingerprint covers besides weights; JSON-serialisable."""
        template = self.processor.template
        about = {
            # what save_pretrained may write anew without changing a number
            "config": repr(replace(self.config, raw={})),
            "vocabulary": sorted(self.tokenizer.get_vocab().items()),
            "tokenizer": splitting_rules(self.tokenizer),
        }
        if self._before_profiles:
            layouts: tuple[tuple[Any, ...], ...] = ((), ("image",))
            rendered = [template.render(layout, "", "") for layout in layouts]
            return {**about, "prompts": [f"{prompt.head}{prompt.tail}" for prompt in rendered]}
        return {**about, "family": self.family, "profile": self.profile.fingerprint(template)}

    # -- loading ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path | None = None, **options: Any) -> Self:
        """``ume_models.load`` with this family.

        Raises:
            CheckpointError: a file is missing, damaged or belongs to another family.
            ValueError: an option is out of range.
        """
        from ume_models.embedders.loading import load_as

        return load_as(cls, path_or_id, **options)

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: Processor,
        profile: Profile,
        options: EmbedOptions,
        engine: EngineName = "fast",
        sources: Sequence[Path] = (),
    ) -> None:
        """Give the model its tokenizer, processor, profile and defaults (done by ``load``).

        ``sources`` are the folders its tokenizer and processor files came from, first match first.
        """
        self.tokenizer = tokenizer
        self.processor = processor
        self.profile = profile
        self.options = options
        self.engine = engine
        self.sources = tuple(sources)
        self._structure = Structure(self)
        self._forced = self.token_ids(profile.forced)
        prompt = str(processor.template.render((), "", "a text"))
        self._rendered = bool(profile.forced) and prompt.endswith(profile.forced)
        tap = profile.tap
        self._marker = None if tap.token is None else self.tokenizer.get_vocab().get(tap.token)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens around it."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _tapped(self, prompt: Prompt) -> int:
        return self.profile.tap.index(prompt.input_ids, self._marker)

    # -- identity ---------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy())
        return digest.hexdigest()[:32]

    def described(self, options: EmbedOptions) -> dict[str, Any]:
        profile = {
            "embedder": self.family,
            "profile": self.profile.name,
            "profile_fingerprint": self.profile.fingerprint(self.processor.template),
        }
        return {
            "family": self.config.family,
            "hidden_size": self.config.hidden_size,
            "layers": self.config.num_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "engine": self.engine,
            **options.described(),
            **({} if self._before_profiles else profile),
        }

    @property
    def _before_profiles(self) -> bool:
        return self.profile == self.profiles.get(BEFORE_PROFILES)

    @property
    def _profile_name(self) -> str:
        name = self.profile.name
        if self.profiles.get(name) != self.profile:
            raise OptionError(
                f"the profile {name!r} is not one of the family {self.family} "
                f"({', '.join(self.profiles)}), so it would not be found again by its name; load "
                "the model with one of these"
            )
        return name

    @property
    def load_options(self) -> dict[str, Any]:
        rules = self.processor.rules
        return {
            "family": self.family,
            "profile": self._profile_name,
            **self.options.described(),
            "multi_image": rules.multi_image,
            "pictures": rules.pictures,
            "empty": self.processor.empty,
            "min_pixels": rules.min_pixels,
            "max_pixels": rules.max_pixels,
        }

    def reserve(self, options: EmbedOptions) -> int:
        forced = 0 if self._rendered else len(self.forced(options))
        return forced + self.policy(options).reserve

    # -- engines ----------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.refresh()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles get engines of their own.
        return {**self.__dict__, "_rollout": None, "_reference": None}

    def refresh(self) -> None:
        """Let the engines go; the next call makes new ones."""
        self._rollout = self._reference = None

    def free_memory(self) -> None:
        if self._rollout is not None:
            self._rollout.arena.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def rollout(self) -> Engine:
        """The fast engine over the current weights, which it reads at every call."""
        engine = self._rollout
        if engine is None or (engine.device, engine.dtype) != (self.device, self.dtype):
            engine = self._rollout = Engine(self.config, self.model, self.visual)
        return engine

    @property
    def reference(self) -> Any:
        """The official code's way over a transformers module that shares the weights."""
        places = hash(tuple(parameter.data_ptr() for parameter in self.parameters()))
        if self._reference is None or self._reference[0] != places:
            module = build_transformers_model(
                self.config, self.state_dict(), self.model.embed_tokens.weight.shape[0]
            )
            self._reference = (places, self._make_reference(module))
        return self._reference[1]

    # -- embedding --------------------------------------------------------------------------

    def embed(  # type: ignore[override]  # the overloads are the contract's
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        *,
        mm_token_type_ids: torch.Tensor | None = None,
        return_trace: bool = False,
        **options: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, Trace]:
        rows = rows_of_batch(
            self.config,
            input_ids,
            attention_mask,
            (pixel_values, image_grid_thw),
            (pixel_values_videos, video_grid_thw),
        )
        chosen = self.options.replaced(options)
        embeddings, trace = self._embed_rows(rows, chosen, return_trace)
        return embeddings if trace is None else (embeddings, trace)

    def embed_prepared(
        self, rows: Sequence[PreparedItem], options: EmbedOptions | None = None
    ) -> torch.Tensor:
        return self._embed_rows(self._prepared(rows), options or self.options, False)[0]

    def embed_traced(
        self, rows: Sequence[PreparedItem], options: EmbedOptions | None = None
    ) -> tuple[torch.Tensor, Trace]:
        embeddings, trace = self._embed_rows(self._prepared(rows), options or self.options, True)
        assert trace is not None
        return embeddings, trace

    def _prepared(self, rows: Sequence[PreparedItem]) -> list[Row]:
        found: list[Row] = []
        for item in rows:
            if item.convention not in ("", self.processor.convention):
                reason = "was prepared under another profile, or with other options of pictures, "
                reason += "than this model's; prepare it with model.prepare"
                raise ItemError(reason, item.index, item.id, kind=ErrorKind.OTHER_SETTINGS)
            images = _visuals(item.pixel_values, item.image_grid_thw, False)
            videos = _visuals(item.pixel_values_videos, item.video_grid_thw, True)
            found.append((item.input_ids.numpy(), images + videos))
        return found

    def _embed_rows(
        self, rows: Sequence[Row], options: EmbedOptions, trace: bool
    ) -> tuple[torch.Tensor, Trace | None]:
        if not rows:
            raise ValueError("the batch is empty")
        if not isinstance(options, self.Options):
            raise TypeError(f"options must be {self.Options.__name__}, got {options!r}")
        self._structure.check(self)
        # Not inference mode, even inside the caller's: the arena is kept for the next call, which
        # must be able to use it outside. Autocast would cast what is written into it.
        autocast_off = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast_off:
            forced = np.array(self.forced(options), dtype=np.int64)
            batch = [build_sequence(_ending(ids, forced), self.config, v) for ids, v in rows]
            hidden, found = self._hidden(batch, options, trace)
            return unit_norm(hidden), found

    def prepare(
        self, items: Iterable[Any], *, base_dir: str | Path | None = None
    ) -> list[PreparedItem]:
        plans = self.processor.plan(list(items), base_dir=base_dir)
        return [self.processor.load(plan) for plan in plans]

    def encode(self, items: Iterable[Any], **options: Any) -> torch.Tensor:
        return encode(self, items, **options)

    # -- saving -----------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the official checkpoint layout; every file appears whole or not at all.

        Small JSON files beside it name family, profile and options, as ``load`` takes them again,
        and let sentence-transformers open the folder.

        Raises:
            CheckpointError, OSError: a file cannot be written or copied.
        StructureError: a layer is wrapped, hooked or replaced.
        OptionError: the profile is not one of the family's, so that its name would not find it.
        """
        self._structure.check(self)
        options = self.load_options
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name in SIDE_FILES:
            for source in self.sources:
                if (source / name).is_file():
                    write_atomically(target / name, (source / name).read_bytes())
                    break
        raw = dict(self.config.raw)
        rows = self.model.embed_tokens.weight.shape[0]
        raw["vocab_size"] = rows
        if isinstance(raw.get("text_config"), dict):
            raw["text_config"] = {**raw["text_config"], "vocab_size": rows}
        raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        write_json(target / "config.json", raw)
        write_identity(target, options.pop("family"), options.pop("profile"), options)
        write_library_files(target, self.sources)
        write_state(target, self.state_dict(), max_shard_bytes)


def _ending(ids: np.ndarray, forced: np.ndarray) -> np.ndarray:
    """Ids that end with ``forced``, of which they may have a beginning already."""
    for there in range(min(ids.size, forced.size), 0, -1):
        if np.array_equal(ids[ids.size - there :], forced[:there]):
            return np.concatenate([ids, forced[there:]])
    return np.concatenate([ids, forced])


def _visuals(
    pixels: torch.Tensor | None, grids: torch.Tensor | None, is_video: bool
) -> list[Visual]:
    if pixels is None or grids is None:
        return []
    shapes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    if len(shapes) == 1:
        return [Visual(pixels, shapes[0], is_video)]
    parts = pixels.split([t * h * w for t, h, w in shapes])
    return [Visual(part, shape, is_video) for part, shape in zip(parts, shapes, strict=True)]
