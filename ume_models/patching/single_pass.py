"""Calls of a language model of which one hidden state per row is read, while a script's loop runs.

Scripts that embed with a generative model ask for all layers' hidden states and for logits at
every position, and read one vector per row of the last layer. Where it is known beforehand which,
the batch is packed without padding, and nothing behind those tokens is computed; where the fast
engine does not know the model, its own layers run without head, cache and list of states.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ume_models.embedders.rows import PROCESSOR_INPUTS
from ume_models.errors import PatchError
from ume_models.patching import models
from ume_models.patching.changes import commit, undo
from ume_models.patching.detour import detour
from ume_models.patching.engine import engine_for
from ume_models.patching.forwards import NoLogits, undisturbed
from ume_models.patching.unwrap import lineage, unwrap

logger = logging.getLogger(__name__)

KNOWN = frozenset(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"))

_INPUTS = frozenset((*PROCESSOR_INPUTS, "mm_token_type_ids"))

Read = Callable[[torch.Tensor], Sequence[int]]
"""Which token of each row of ``input_ids [B, N]`` is read, negative from the end."""


@contextmanager
def single_pass(model: nn.Module, read: Read | None = None) -> Iterator[None]:
    """Patch a model's layers as ``ume_models.accelerate`` does, for the time of a loop.

    A model of a class not known here, or compiled, is used as it is, and a warning says so.

    Args:
        model: ``Qwen2VLForConditionalGeneration`` or its 2.5 sibling, bare or inside PEFT.
        read: of calls that ask for hidden states, only those states are computed; all others in
            ``hidden_states[-1]`` are NaN, and nothing else is in the output.
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
    try:
        changes, _ = models.plan(root, strict=False)
    except PatchError as error:
        logger.warning("the layers are used as they are: %s", error)
        changes = []
    commit(changes)
    try:
        if read is None:
            yield
        else:
            present = root.forward
            with detour(root, functools.partial(_forward, root, present, read)):
                yield
    finally:
        undo(changes)


def _forward(
    root: nn.Module, present: Callable[..., Any], read: Read, *args: Any, **kwargs: Any
) -> Any:
    """Forward of the model; the present one where another output is asked for."""
    given = {key: value for key, value in kwargs.items() if value is not None}
    asked = {"output_hidden_states", "return_dict"}
    if (
        args
        or not given.get("output_hidden_states")
        or given.get("return_dict") is False
        or not set(given) - asked <= _INPUTS
        or not undisturbed()
    ):
        return present(*args, **kwargs)
    inputs = {key: value for key, value in given.items() if key not in asked}
    states = _by_engine(root, inputs, read)
    if states is None:
        states = _without_head(root, present, inputs)
    return SimpleNamespace(hidden_states=(states,))


def _by_engine(root: nn.Module, inputs: Mapping[str, Any], read: Read) -> torch.Tensor | None:
    """``[B, N, D]``, NaN but for the states that are read; None where the engine cannot run."""
    ids = inputs.get("input_ids")
    if (
        torch.is_grad_enabled()
        or not isinstance(ids, torch.Tensor)
        # transformers 5 counts the positions of videos in another way than the engine
        or ("mm_token_type_ids" in inputs and "video_grid_thw" in inputs)
    ):
        return None
    engine, reason = engine_for(root)
    if engine is None:
        _tell(reason)
        return None
    kind = engine.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not engine.dtype:
        return None
    places = read(ids)
    tokens = unpadded(places, ids, inputs.get("attention_mask"))
    if tokens is None:
        return None
    try:
        found = engine.hidden_at(engine.rows(inputs), tokens)
    except ValueError as error:
        _tell(str(error))
        return None
    except torch.OutOfMemoryError:
        _tell("the engine did not get enough memory; a smaller batch is faster")
        engine.release()
        return None
    states = found.new_full((*ids.shape, found.shape[1]), torch.nan)
    states[torch.arange(len(found)), torch.tensor(places)] = found
    return states


def _without_head(
    root: nn.Module, present: Callable[..., Any], inputs: Mapping[str, Any]
) -> torch.Tensor:
    """Hidden states ``[B, N, D]`` by the model's own layers."""
    seen: list[torch.Tensor] = []
    base: Any = root.model
    head: Any = root.lm_head
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        with detour(head, NoLogits(head)):
            present(**inputs, output_hidden_states=False, use_cache=False, return_dict=True)
    finally:
        handle.remove()
    return seen[-1]


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
