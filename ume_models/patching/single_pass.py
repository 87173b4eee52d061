"""Calls of a language model of which only the last layer's hidden states are read.

Scripts that embed with a generative model ask for all layers' hidden states and for logits at
every position, and read one vector per row of the last layer. While ``single_pass`` is in force,
such a call computes what is read:

* ``model(**inputs, output_hidden_states=True)`` runs without the language-model head, without a
  key-value cache and without the list of other layers' states. Where the fast engine knows the
  model and the script says which token of each row it reads (``reading``), the batch is packed
  without padding and nothing behind those tokens is computed;
* ``model.generate(..., output_hidden_states=True, return_dict_in_generate=True)`` keeps the last
  layer's states of each step, O(T·D) instead of O(T·L·D). What it generates is untouched.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.errors import PatchError
from ume_models.patching import models
from ume_models.patching.changes import ABSENT, InstanceForward, commit, undo
from ume_models.patching.engine import engine_for
from ume_models.patching.forwards import NoLogits, undisturbed
from ume_models.patching.last_states import LastLayer, LastStates, PendingStates, layers_of
from ume_models.patching.unwrap import lineage, unwrap

logger = logging.getLogger(__name__)

KNOWN = frozenset(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"))

_ENGINE_INPUTS = frozenset((*PROCESSOR_INPUTS, "mm_token_type_ids"))

_GENERATION_INPUTS = frozenset(
    ("use_cache", "past_key_values", "cache_position", "logits_to_keep", "num_logits_to_keep")
)
"""What ``generate`` passes to each step, and a script that embeds does not."""

_pending: ContextVar[weakref.ref[PendingStates] | None] = ContextVar("ume_pending", default=None)
"""States of the last forward call that nobody has read yet."""


def reading(positions: Sequence[int]) -> None:
    """Say which token of each row of the last call is going to be read.

    Args:
        positions: one index per row into the padded row, negative from the end. Reading others
            all the same is right too, but computes every state.
    """
    reference = _pending.get()
    states = None if reference is None else reference()
    if states is not None:
        states.expect(positions)


@contextmanager
def single_pass(model: nn.Module, *, parts: bool = True) -> Iterator[None]:
    """Compute only the last layer's hidden states where a script reads only those.

    The model's instance is changed on entering and put back on leaving; a model of a class not
    known here, or compiled, is used as it is, and a warning says so.

    Args:
        model: ``Qwen2VLForConditionalGeneration`` or its 2.5 sibling, bare or inside PEFT.
        parts: also patch its layers as ``ume_models.accelerate(model)`` does.
    """
    root = unwrap(model)
    if not KNOWN & lineage(root) or "OptimizedModule" in lineage(model):
        logger.warning(
            "%s is used as it is: known are %s, not compiled",
            type(model).__name__,
            ", ".join(sorted(KNOWN)),
        )
        yield
        return
    changes = _changes_of_parts(root) if parts else []
    commit(changes)
    try:
        with _instead(root, SinglePass(root, vars(root).get("forward", ABSENT))):
            yield
    finally:
        _pending.set(None)
        undo(changes)


def _changes_of_parts(root: nn.Module) -> Any:
    try:
        changes, _ = models.plan(root, strict=False)
    except PatchError as error:
        logger.warning("the layers are used as they are: %s", error)
        return []
    return changes


class SinglePass(InstanceForward):
    """Forward of a ``…ForConditionalGeneration`` while ``single_pass`` is in force.

    Args:
        module: the model.
        before: forward that stood there, ABSENT for that of the class.
    """

    def __init__(self, module: nn.Module, before: Any = ABSENT) -> None:
        super().__init__(module)
        self.before = self.original if before is ABSENT else before
        self.length = layers_of(module) + 1
        self.head: Any = module.lm_head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original where another output is asked for than the last hidden states."""
        if (
            args
            or not kwargs.get("output_hidden_states")
            or kwargs.get("output_attentions")
            or kwargs.get("labels") is not None
            or kwargs.get("return_dict") is False
            or not undisturbed()
        ):
            return self.before(*args, **kwargs)
        if kwargs.keys() & _GENERATION_INPUTS:
            with _last_hidden_state(self.module) as seen:
                output = self.before(**{**kwargs, "output_hidden_states": False})
            output["hidden_states"] = LastLayer(seen[-1], self.length)
            return output
        states = self._by_engine(kwargs)
        if states is None:
            return LastStates(self._without_head(kwargs), self.length, self.head)
        _pending.set(weakref.ref(states))
        return LastStates(states, self.length, self.head)

    def _without_head(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states ``[B, S, D]`` by the model's own layers."""
        without = _instead(self.head, NoLogits(self.head))
        with _last_hidden_state(self.module) as seen, without:
            self.before(**{**inputs, "output_hidden_states": False, "use_cache": False})
        return seen[-1]

    def _by_engine(self, inputs: Mapping[str, Any]) -> PendingStates | None:
        """States to be computed by the engine when it is known which; None without an engine."""
        given = {key: value for key, value in inputs.items() if value is not None}
        asked = set(given) - {"output_hidden_states", "return_dict"}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if (
            torch.is_grad_enabled()
            or not asked <= _ENGINE_INPUTS
            or not isinstance(ids, torch.Tensor)
            # transformers 5 counts the positions of videos in another way than the engine
            or ("mm_token_type_ids" in given and "video_grid_thw" in given)
        ):
            return None
        engine, reason = engine_for(self.module)
        if engine is None:
            _tell(reason)
            return None
        device = engine.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if autocast[0] and autocast[1] is not engine.dtype:
            return None

        def at(positions: list[int]) -> torch.Tensor | None:
            tokens = unpadded(positions, ids, mask)
            if tokens is None:
                return None
            try:
                return engine.hidden_at(engine.rows(given), tokens)
            except ValueError as error:
                _tell(str(error))
            except torch.OutOfMemoryError:
                _tell("the engine did not get enough memory; a smaller batch is faster")
                engine.release()
            return None

        def whole() -> torch.Tensor:
            enabled, dtype = autocast
            with torch.no_grad(), torch.autocast(device, enabled=enabled, dtype=dtype):
                return self._without_head(inputs)

        return PendingStates(ids.shape[0], at, whole)


@functools.cache  # a reason is told once, not for every batch
def _tell(reason: str) -> None:
    logger.warning("the model's own layers run, without logits: %s", reason)


def unpadded(
    positions: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[int] | None:
    """Positions among the tokens of each row that are not padding.

    Args:
        positions: one per row, into the padded row, negative from the end.
        input_ids: ``[B, N]``.
        attention_mask: ``[B, N]`` or None.

    Returns:
        None where one of them is padding or outside of the row.
    """
    length = input_ids.shape[1]
    places = [p + length if p < 0 else p for p in positions]
    if not all(0 <= p < length for p in places):
        return None
    if attention_mask is None:
        return places
    if attention_mask.shape != input_ids.shape:
        return None
    mask = attention_mask.cpu() != 0
    at = torch.tensor(places)[:, None]
    if not bool(mask.gather(1, at).all()):
        return None
    counted: list[int] = (mask.cumsum(dim=1).gather(1, at)[:, 0] - 1).tolist()
    return counted


@contextmanager
def _last_hidden_state(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The last hidden states ``[B, S, D]`` of each run of the model below the head."""
    seen: list[torch.Tensor] = []
    base: Any = model.model

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0])

    handle = base.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _instead(module: nn.Module, forward: InstanceForward) -> Iterator[None]:
    """Another forward of one instance for a while."""
    own = vars(module)
    before = own.get("forward", ABSENT)
    own["forward"] = forward
    try:
        yield
    finally:
        if before is ABSENT:
            own.pop("forward", None)
        else:
            own["forward"] = before
