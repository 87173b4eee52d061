"""The fast engine on the weights of a model that somebody else loaded.

``engine_for`` looks at a transformers module, makes a view of it once and keeps it for as long as
the module lives and looks the same. Nothing is stored on the module, nothing here keeps it alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ume_models.backbone.config import BackboneConfig
from ume_models.embedders.rows import rows_of_batch
from ume_models.patching.unwrap import unwrap
from ume_models.patching.view import NoViewError, View, make_view, survey
from ume_models.rollout.engine import Engine as Backbone
from ume_models.rollout.engine import Trace
from ume_models.rollout.latent import Latent, LatentPlan
from ume_models.rollout.sequence import Sequence as Prompt
from ume_models.rollout.sequence import Visual, build_sequence
from ume_models.rollout.single_pass import SinglePass

Row = tuple[np.ndarray, list[Visual]]
"""Unpadded token ids of one input and its images and videos."""


class Engine:
    """Packed prefill and batched latent rollout on a view of a model.

    Results are those of the model in evaluation mode: hidden states after the final norm, in its
    own dtype, without gradient. M-RoPE positions are computed the official way (transformers 4)
    under every version.

    Args:
        view: our modules on the model's parameters.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self._backbone = Backbone(view.config, view.text, view.visual)

    @property
    def config(self) -> BackboneConfig:
        """Architecture."""
        return self.view.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.view.text.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.view.text.embed_tokens.weight.dtype

    def rows(self, inputs: Mapping[str, Any]) -> list[Row]:
        """``rows_of_inputs`` with this model's configuration."""
        return rows_of_inputs(self.config, inputs)

    def prompt(self, row: Row, extra: int = 0) -> Prompt:
        """One row with its positions.

        Raises:
            ValueError: visual tokens and grids do not match, or the row and the ``extra`` tokens
                that follow exceed the model's positions.
        """
        ids, visuals = row
        limit = self.config.max_position_embeddings
        if ids.size + extra > limit:
            raise ValueError(f"{ids.size} tokens and {extra} more exceed {limit} positions")
        return build_sequence(ids, self.config, visuals)

    def hidden_at(self, rows: Sequence[Row | Prompt], tokens: Sequence[int]) -> torch.Tensor:
        """Hidden states ``[B, D]`` of one token per row, by its index; negative from the end."""
        batch = [replace(self._prompt(row)) for row in rows]  # one may stand there twice
        at = {id(prompt): token for prompt, token in zip(batch, tokens, strict=True)}
        policy = SinglePass(lambda prompt: at[id(prompt)] % len(prompt))
        with _plain_mode(self.device):
            return self._backbone.run(batch, policy)[0]

    def rollout(
        self,
        rows: Sequence[Row | Prompt],
        plan: LatentPlan,
        *,
        adapter: bool = True,
        trace: bool = False,
    ) -> tuple[torch.Tensor, Trace | None]:
        """Latent rollout of a batch.

        Args:
            rows: unpadded; the assistant prefix is part of them.
            plan: steps, suffix and context.
            adapter: False feeds hidden states back unchanged.
            trace: also return intermediate states.

        Returns:
            Hidden states ``[B, D]`` at the last suffix token, not normalised, and the trace.
        """
        batch = [self._prompt(row) for row in rows]
        with _plain_mode(self.device):
            policy = Latent(plan, self.view.adapter if adapter else None)
            return self._backbone.run(batch, policy, trace)

    def release(self) -> None:
        """Free what was allocated for batches; the next one allocates again."""
        self._backbone.arena.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prompt(self, row: Row | Prompt) -> Prompt:
        return row if isinstance(row, Prompt) else self.prompt(row)


@contextmanager
def _plain_mode(device: torch.device) -> Any:
    # Not inference mode, even inside the caller's: arena and headers are used again outside of
    # it. Autocast would cast what is written into the arena.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


# -- one engine per model ------------------------------------------------------------------------


class _Kept:
    """What is known of one model: its state when looked at, and the engine or why there is none."""

    def __init__(self, identity: Any, stamp: int, engine: Engine | None, reason: str) -> None:
        self.identity = identity
        self.stamp = stamp
        self.engine = engine
        self.reason = reason


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def engine_for(model: nn.Module) -> tuple[Engine | None, str]:
    """The engine on a model's present weights, or None and the reason.

    The model is looked over at every call (about a microsecond per module): when a parameter was
    replaced, moved or written in place since, a new engine is made. Nothing that was computed from
    the weights is kept from one batch to the next, so writes that leave no trace are no danger.

    Args:
        model: ``Qwen2VLForConditionalGeneration`` and its kin of any supported transformers, or
            VLM2Vec's copies of them, bare or inside DDP, ``torch.compile`` or a PEFT model whose
            adapters are merged; with or without ``latent_moe_transition``.

    Returns:
        ``(engine, "")``, or ``(None, reason)`` for sharded, quantised or meta parameters,
        adapters that are not merged, hooks, active dropout, or an unknown architecture.
    """
    with _lock:
        root = unwrap(model)
        state = survey(root)
        if state.obstacle is not None:
            return None, state.obstacle
        kept = _kept.get(root)
        if kept is None or kept.identity != state.identity or kept.stamp != state.stamp:
            try:
                kept = _Kept(state.identity, state.stamp, Engine(make_view(root)), "")
            except NoViewError as error:
                kept = _Kept(state.identity, state.stamp, None, str(error))
            _kept[root] = kept
        return kept.engine, kept.reason


# -- inputs --------------------------------------------------------------------------------------


def rows_of_inputs(config: BackboneConfig, inputs: Mapping[str, Any]) -> list[Row]:
    """Rows of a batch in processor layout.

    Args:
        config: architecture.
        inputs: ``input_ids [B, N]``, ``attention_mask``, ``pixel_values``, ``image_grid_thw`` and
            the same for videos. VLM2Vec's layout is known too: lists with one tensor, or None, per
            row. Other keys are ignored.

    Raises:
        ValueError: they do not fit together; the row is named.
    """
    return rows_of_batch(
        config,
        inputs["input_ids"],
        inputs.get("attention_mask"),
        (_joined(inputs.get("pixel_values")), _joined(inputs.get("image_grid_thw"))),
        (_joined(inputs.get("pixel_values_videos")), _joined(inputs.get("video_grid_thw"))),
    )


def _joined(values: Any) -> torch.Tensor | None:
    """One tensor of a list with a tensor or None per row."""
    if values is None or isinstance(values, torch.Tensor):
        return values
    as_tensor: Callable[[Any], torch.Tensor] = torch.as_tensor
    parts = [as_tensor(value) for value in values if value is not None]
    parts = [part for part in parts if part.numel()]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) if parts else None
