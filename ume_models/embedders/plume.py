"""PLUME: latent reasoning embedder on Qwen2-VL or Qwen2.5-VL."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ume_kernels import MoETransition
from ume_models.atomic import write_atomically
from ume_models.backbone.checkpoint import write_json, write_state
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.text import TextModel
from ume_models.backbone.tokenizer import TokenIds, splitting_rules
from ume_models.backbone.transformers_model import build_transformers_model
from ume_models.backbone.vision import VisionModel
from ume_models.embedders.library_files import write_library_files
from ume_models.embedders.plume_reference import ReferenceEngine
from ume_models.embedders.rows import rows_of_batch
from ume_models.processing.processor import Processor
from ume_models.processing.prompt import PREFIX, SUFFIX
from ume_models.rollout.latent import LatentPlan, LatentRollout, RolloutTrace, last_index, unit_norm
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.sequence import Visual, build_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ume_models.processing.processor import PreparedItem

Mode = Literal["gen", "disc", "last"]
Context = Literal["disc", "prefix_last", "none"]
Engine = Literal["fast", "reference"]

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
class PlumeSettings:
    """Defaults of a loaded model; ``embed`` and ``encode`` can override most per call.

    Attributes:
        engine: ``"fast"`` (packed, batched) or ``"reference"`` (the official loop).
        latent_steps: K, latent states rolled out before the suffix.
        context: what the router sees besides the latent state.
        max_new_tokens: decode budget after the suffix in the reference loop. The official
            default is 4096; a trained model stops after one token.
        disc_offset: token read in ``mode="disc"``: 0 is ``<disc_emb>`` itself as in training,
            1 the token after it as in the official evaluation script.
    """

    engine: Engine = "fast"
    latent_steps: int = 8
    context: Context = "disc"
    max_new_tokens: int = 1
    disc_offset: int = 0


class PlumeForEmbedding(nn.Module):
    """Embeds text, images and video into one space after K continuous latent steps.

    Its state dict is the official checkpoint: ``model.*``, ``visual.*``, ``lm_head.weight``
    where embeddings are not tied, ``latent_moe_transition.*``. Make one with
    ``ume_models.load``.

    Paper: PLUME, arXiv 2604.02073; official code ``VLM2Vec/eval_twomode.py``.
    """

    def __init__(
        self,
        config: BackboneConfig,
        adapter: MoETransition | None,
        vocab_size: int,
        tied: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        self.visual = VisionModel(config.vision)
        self.lm_head = None if tied else nn.Linear(config.hidden_size, vocab_size, bias=False)
        self.latent_moe_transition = adapter
        self.settings = PlumeSettings()
        self._rollout: LatentRollout | None = None
        self._reference: ReferenceEngine | None = None
        self._fingerprint: str | None = None
        self._stamp: int | None = None

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: Processor,
        tokens: TokenIds,
        settings: PlumeSettings,
        sources: Sequence[Path],
    ) -> None:
        """Give the model its tokenizer, processor, token ids and defaults (done by ``load``).

        ``sources`` are the folders its tokenizer and processor files came from, first match first.
        """
        self.tokenizer = tokenizer
        self.processor = processor
        self.tokens = tokens
        self.settings = settings
        self.sources = tuple(sources)
        self.prefix_ids = tuple(tokenizer.encode(PREFIX, add_special_tokens=False))
        self.suffix_ids = tuple(tokenizer.encode(SUFFIX, add_special_tokens=False))

    # -- identity ---------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width D of an embedding."""
        return self.config.hidden_size

    @property
    def latent_steps(self) -> int:
        """Default number of latent steps K."""
        return self.settings.latent_steps

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def fingerprint(self) -> str:
        """Hash of everything that makes two loaded models give different embeddings.

        All weights, the architecture, the tokenizer, the rendered prompt and the adapter's
        options. It reads every weight, once.
        """
        self._refresh_if_changed()
        if self._fingerprint is None:
            digest = hashlib.sha256()
            about = {
                # what save_pretrained may write anew without changing a number
                "config": repr(replace(self.config, raw={})),
                "vocabulary": sorted(self.tokenizer.get_vocab().items()),
                "tokenizer": splitting_rules(self.tokenizer),
                "prompts": [self.processor.template.render(k, "") for k in ((), ("image",))],
                "ids": [self.prefix_ids, self.suffix_ids, sorted(self.tokens.eos)],
                "top_k": getattr(self.latent_moe_transition, "top_k", None),
            }
            digest.update(json.dumps(about, sort_keys=True).encode())
            for name, tensor in self.state_dict().items():
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    @property
    def config_summary(self) -> dict[str, Any]:
        """What determines the numbers besides the weights; JSON-serialisable."""
        return {
            "family": self.config.family,
            "hidden_size": self.config.hidden_size,
            "layers": self.config.num_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "engine": self.settings.engine,
            "latent_steps": self.settings.latent_steps,
            "context": self.settings.context,
            "disc_offset": self.settings.disc_offset,
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Moving or casting replaces the tensors both engines hold on to.
        result = super()._apply(fn, recurse)
        self.refresh()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles get engines of their own.
        return {**self.__dict__, "_rollout": None, "_reference": None}

    def refresh(self) -> None:
        """Forget everything derived from the weights.

        Done by itself when parameters are replaced or changed in place through PyTorch; needed
        only after changes PyTorch does not count, such as through ``.data`` or NumPy.
        """
        self._rollout = self._reference = self._fingerprint = None

    def _refresh_if_changed(self) -> None:
        held = ((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        stamp = hash((_optimizer_steps, *held))
        if stamp != self._stamp:
            self.refresh()
            self._stamp = stamp

    # -- engines ----------------------------------------------------------------------------

    @property
    def rollout(self) -> LatentRollout:
        """The fast engine over the current weights."""
        self._refresh_if_changed()
        if self._rollout is None:
            self._rollout = LatentRollout(
                self.config, self.model, self.visual, self.latent_moe_transition
            )
            for prompt in self._constant_headers():
                self._rollout.headers.register(prompt)
        return self._rollout

    def _constant_headers(self) -> list[Prompt]:
        """Beginnings shared by all prompts: with the blank image, and up to the first image."""
        pixels, grid = self.processor.blank_image
        text = self.processor.template.header(("image",))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        image = ids.index(self.config.image_token_id)
        merged = grid[0] * grid[1] * grid[2] // self.config.vision.merge_size**2
        with_blank = ids[:image] + [ids[image]] * merged + ids[image + 1 :]
        return [
            build_sequence(np.array(ids[:image], dtype=np.int64), self.config),
            build_sequence(
                np.array(with_blank, dtype=np.int64), self.config, [Visual(pixels, grid)]
            ),
        ]

    @property
    def reference(self) -> ReferenceEngine:
        """The official loop over a transformers module that shares the weights."""
        self._refresh_if_changed()
        if self._reference is None:
            rows = self.model.embed_tokens.weight.shape[0]
            module = build_transformers_model(self.config, self.state_dict(), rows)
            self._reference = ReferenceEngine(
                self.config,
                module,
                self.latent_moe_transition,
                self.tokens.eos,
                self.tokens.gen_emb,
                self.settings.max_new_tokens,
            )
        return self._reference

    # -- embedding --------------------------------------------------------------------------

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
        mm_token_type_ids: torch.Tensor | None = ...,
        mode: Mode = ...,
        latent_steps: int | None = ...,
        context: Context | None = ...,
        exclude_experts: Sequence[int] = ...,
        verify_eos: bool = ...,
        return_trace: Literal[False] = ...,
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
        mm_token_type_ids: torch.Tensor | None = ...,
        mode: Mode = ...,
        latent_steps: int | None = ...,
        context: Context | None = ...,
        exclude_experts: Sequence[int] = ...,
        verify_eos: bool = ...,
        return_trace: Literal[True],
    ) -> tuple[torch.Tensor, RolloutTrace]: ...

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        *,
        mm_token_type_ids: torch.Tensor | None = None,
        mode: Mode = "gen",
        latent_steps: int | None = None,
        context: Context | None = None,
        exclude_experts: Sequence[int] = (),
        verify_eos: bool = False,
        return_trace: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, RolloutTrace]:
        """Embeddings of a padded batch in Hugging Face processor layout.

        Args:
            input_ids: int64 ``[B, N]``, padded on either side; visual tokens expanded. The
                assistant prefix ``<think><bot>`` is appended where it is missing
                (``mode="gen"``).
            attention_mask: ``[B, N]``, 1 for real tokens; default all.
            pixel_values: ``[P, C·T·p·p]`` patches of all images of the batch, in order.
            image_grid_thw: ``[images, 3]``.
            pixel_values_videos, video_grid_thw: the same for videos.
            mm_token_type_ids: what processors of transformers 5 add; not needed, ignored.
            mode: ``"gen"`` latent rollout, ``"disc"`` hidden state at ``<disc_emb>``,
                ``"last"`` hidden state at the last prompt token.
            latent_steps, context: override the model's defaults.
            exclude_experts: experts the router must not choose.
            verify_eos: check that the model would stop after the suffix, as the fast engine
                assumes, and run the official decode loop for rows where it would not.
            return_trace: also return latents, anchor and final hidden state (``mode="gen"``).

        Returns:
            Unit-norm float32 ``[B, D]`` on the model's device, and the trace if asked for.

        Raises:
            ValueError: shapes, grids and tokens do not fit together; the row is named.
            CapacityError: a prompt exceeds the model's positions.
        """
        rows = rows_of_batch(
            self.config,
            input_ids,
            attention_mask,
            (pixel_values, image_grid_thw),
            (pixel_values_videos, video_grid_thw),
        )
        return self._embed_rows(
            rows, mode, latent_steps, context, exclude_experts, verify_eos, return_trace
        )

    def embed_prepared(
        self,
        items: Sequence[PreparedItem],
        *,
        mode: Mode = "gen",
        latent_steps: int | None = None,
        context: Context | None = None,
        exclude_experts: Sequence[int] = (),
        verify_eos: bool = False,
    ) -> torch.Tensor:
        """Embeddings ``[B, D]`` of items the processor prepared; no padding is involved."""
        rows = []
        for item in items:
            images = _visuals(item.pixel_values, item.image_grid_thw, False)
            videos = _visuals(item.pixel_values_videos, item.video_grid_thw, True)
            rows.append((item.input_ids.numpy(), images + videos))
        out = self._embed_rows(
            rows, mode, latent_steps, context, exclude_experts, verify_eos, False
        )
        assert isinstance(out, torch.Tensor)
        return out

    def _embed_rows(
        self,
        rows: Sequence[tuple[np.ndarray, list[Visual]]],
        mode: Mode,
        latent_steps: int | None,
        context: Context | None,
        exclude_experts: Sequence[int],
        verify_eos: bool,
        return_trace: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, RolloutTrace]:
        if mode not in ("gen", "disc", "last"):
            raise ValueError(f"mode must be 'gen', 'disc' or 'last', got {mode!r}")
        if return_trace and mode != "gen":
            raise ValueError("return_trace needs mode='gen'; the other modes have no rollout")
        if not rows:
            raise ValueError("the batch is empty")
        # Not inference mode, even inside the caller's: what is kept for the next call (arena,
        # headers) must stay usable outside of it.
        # Autocast would cast what is written into the arena.
        autocast_off = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast_off:
            batch = [self._prompt(ids, visuals, mode) for ids, visuals in rows]
            if mode != "gen":
                hidden = self._single_pass(batch, mode)
                return unit_norm(hidden)
            plan = self._plan(latent_steps, context, exclude_experts)
            if self.settings.engine == "reference":
                results = [self.reference.run(prompt, plan, return_trace) for prompt in batch]
                hidden = torch.stack([state for state, _ in results])
                trace = _stack_traces([t for _, t in results if t is not None])
            else:
                hidden, trace = self.rollout.run(batch, plan, return_trace)
                if verify_eos:
                    hidden = self._verify_eos(batch, plan, hidden)
            embeddings = unit_norm(hidden)
            return embeddings if trace is None else (embeddings, trace)

    def _prompt(self, ids: np.ndarray, visuals: list[Visual], mode: Mode) -> Prompt:
        prefix = np.array(self.prefix_ids, dtype=np.int64)
        has_prefix = ids.size >= prefix.size and np.array_equal(ids[-prefix.size :], prefix)
        if mode == "gen" and not has_prefix:
            ids = np.concatenate([ids, prefix])
        return build_sequence(ids, self.config, visuals)

    def _plan(
        self,
        latent_steps: int | None,
        context: Context | None,
        exclude_experts: Sequence[int],
    ) -> LatentPlan:
        steps = self.settings.latent_steps if latent_steps is None else latent_steps
        chosen = self.settings.context if context is None else context
        steps = check_rollout(steps, chosen)
        excluded = tuple(int(e) for e in exclude_experts)
        if excluded and self.latent_moe_transition is None:
            raise ValueError("exclude_experts needs the adapter, but it was loaded without one")
        if self.latent_moe_transition is not None:
            self.latent_moe_transition.exclusion_mask(excluded)  # raises for unknown experts
        return LatentPlan(steps, chosen, excluded, self.suffix_ids, self.tokens.disc_emb)

    def _single_pass(self, batch: Sequence[Prompt], mode: Mode) -> torch.Tensor:
        tokens = []
        for prompt in batch:
            token = len(prompt) - 1
            if mode == "disc":
                token = last_index(prompt, self.tokens.disc_emb)
                if prompt.input_ids[token] != self.tokens.disc_emb:
                    raise ValueError("mode='disc' needs a <disc_emb> token in every prompt")
                token = min(token + self.settings.disc_offset, len(prompt) - 1)
            tokens.append(token)
        if self.settings.engine == "reference":
            pairs = zip(batch, tokens, strict=True)
            return torch.stack([self.reference.hidden_at(p, t) for p, t in pairs])
        return self.rollout.hidden_at(batch, tokens)

    def _verify_eos(
        self, batch: Sequence[Prompt], plan: LatentPlan, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Replace rows that would go on generating by the official loop's result."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        following = F.linear(hidden, head.weight).float().argmax(dim=-1).tolist()
        stop = self.tokens.eos - {self.tokens.gen_emb}
        runaway = [row for row, token in enumerate(following) if token not in stop]
        if runaway:
            hidden = hidden.clone()
        for row in runaway:
            hidden[row] = self.reference.run(batch[row], plan)[0]
        return hidden

    def encode(self, items: Iterable[Any], **options: Any) -> torch.Tensor:
        """Embeddings float32 ``[N, D]`` (CPU) of items; see ``ume_models.encode.encode``."""
        from ume_models.encode import encode

        return encode(self, items, **options)

    # -- saving -----------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the official checkpoint layout; every file appears whole or not at all.

        Two small JSON files beside it let sentence-transformers open the folder.

        Raises:
            CheckpointError, OSError: a file cannot be written or copied.
        """
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
        write_library_files(target, self.sources)
        write_state(target, self.state_dict(), max_shard_bytes)


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers write into parameters without counting it as their version.
register_optimizer_step_post_hook(_count_step)


def check_rollout(latent_steps: int, context: str) -> int:
    """``latent_steps`` as an int; ValueError unless it and ``context`` are usable."""
    try:
        steps = -1 if isinstance(latent_steps, bool) else operator.index(latent_steps)
    except TypeError:
        steps = -1
    if steps < 0:
        raise ValueError(f"latent_steps must be a whole number ≥ 0, got {latent_steps!r}")
    if context not in ("disc", "prefix_last", "none"):
        raise ValueError(f"context must be 'disc', 'prefix_last' or 'none', got {context!r}")
    return steps


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


def _stack_traces(traces: Sequence[RolloutTrace]) -> RolloutTrace | None:
    if not traces:
        return None
    return RolloutTrace(
        torch.cat([t.latents for t in traces]),
        torch.cat([t.anchor for t in traces]),
        torch.cat([t.hidden for t in traces]),
    )
