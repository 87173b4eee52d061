"""VLM2Vec's ``MMEBModel``: one vector per input, without computing what is never read.

The original runs the whole language model, logits of every token included, keeps the hidden
states of all layers and reads one token per row. Here:

* without gradients the batch is packed and runs on the fast engine, up to the token that is read;
* with gradients, or where the engine cannot take the encoder (LoRA that is not merged, say), the
  encoder runs as it is, without its head and without keeping the layers' states;
* the loss of a full batch never holds the matrix of scores.

Positions are those that the encoder computes: VLM2Vec's prompts have no ``<|vision_start|>``, so
they are not what M-RoPE would give.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from ume_models.errors import PatchError, UmeError
from ume_models.patching import versions
from ume_models.patching.changes import Change, InstanceForward
from ume_models.patching.detour import detour
from ume_models.patching.engine import Engine, engine_for
from ume_models.patching.forwards import NoLogits, undisturbed
from ume_models.patching.losses import fits, fused_cross_entropy
from ume_models.patching.recipes import Recipe, Target, missing, refuse_unknown
from ume_models.patching.report import Entry
from ume_models.patching.unwrap import lineage, part, unwrap
from ume_models.patching.versions import ORIGINAL

Tensor = torch.Tensor
Inputs = Mapping[str, Any]

KNOWN = frozenset(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"))
BACKBONES = (None, "qwen2_vl", "qwen2_5_vl")
_PIXELS = ("pixel_values", "pixel_values_videos")
_UNKNOWN = (
    "labels",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "return_dict",
    "output_hidden_states",
    "use_cache",
)


class _Stub:
    """Output of a decoder that was not run."""

    past_key_values = hidden_states = attentions = None

    def __init__(self, nothing: Tensor) -> None:
        self.last_hidden_state = nothing

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


class MMEBModel(Protocol):
    """What is used here of VLM2Vec's class of that name."""

    encoder: nn.Module
    cross_entropy: nn.Module
    temperature: float
    is_ddp: bool
    world_size: int

    def encode_input(self, input: Inputs) -> Tensor: ...
    def compute_similarity(self, q_reps: Tensor, p_reps: Tensor) -> Tensor: ...
    def _pooling(self, last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor: ...
    def _dist_gather_tensor(self, t: Tensor) -> Tensor: ...


def encode(model: MMEBModel, input: Inputs) -> Tensor | None:
    """What ``MMEBModel.encode_input`` returns, ``[B, D]``; None where the original must run."""
    encoder = model.encoder
    root = unwrap(encoder)
    if (
        not undisturbed()
        or getattr(model, "model_backbone", None) not in BACKBONES
        or getattr(model, "pooling", None) not in ("last", "eos")
        or not _official(model, "_pooling")
        or not KNOWN & lineage(root)
        or "tokenselection" in (type(root).forward.__module__ or "")
        or any(_compiled(module) for module in (encoder, root))
        or any(key in input for key in _UNKNOWN)
    ):
        return None
    ids, mask = input.get("input_ids"), input.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    hidden = None
    if not torch.is_grad_enabled() and not _other_products(root):
        hidden = _packed(encoder, root, input)
    if hidden is not None:
        # one token per row is left: that is a batch without padding
        return model._pooling(hidden[:, None], mask.new_ones(len(hidden), 1))
    states = _without_head(encoder, root, input)
    return None if states is None else model._pooling(states, mask)


def _official(model: object, name: str) -> bool:
    """Whether a method is MMEBModel's own, not one of a subclass or of the instance."""
    method = getattr(type(model), name, None)
    return getattr(method, "__qualname__", "") == f"MMEBModel.{name}" and name not in vars(model)


def _compiled(module: nn.Module) -> bool:
    return (
        "OptimizedModule" in lineage(module)
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def _other_products(root: nn.Module) -> bool:
    """Whether autocast computes products in another type than the weights'."""
    weight = next(root.parameters())
    kind = weight.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != weight.dtype


# -- without gradients --------------------------------------------------------------------------


def _packed(encoder: nn.Module, root: nn.Module, input: Inputs) -> Tensor | None:
    """Hidden states ``[B, D]`` of the tokens that are read; None if the engine cannot run."""
    engine, _ = engine_for(encoder)
    decoder = _decoder(root)
    if engine is None or decoder is None:
        return None
    keep = input["attention_mask"].cpu().numpy() != 0
    at = pooled_columns(keep)
    if at is None:
        return None
    # Older versions compute positions otherwise in calls after the first: one call must be one.
    remembered = [(m, vars(m)["rope_deltas"]) for m in root.modules() if "rope_deltas" in vars(m)]
    positions = _positions(encoder, decoder, input)
    tokens = keep.cumsum(axis=1)[np.arange(len(at)), at] - 1
    try:
        if positions is not None:
            batch = _batch(engine, input, keep, positions)
            return engine.hidden_at(batch, tokens.tolist())
    except (ValueError, UmeError):
        pass  # rows that the engine refuses: the original has its own words, or takes them
    for module, value in remembered:
        vars(module)["rope_deltas"] = value
    return None


def pooled_columns(keep: np.ndarray) -> np.ndarray | None:
    """Column that the official pooling reads in each row.

    If no row has padding at its end, that is the last one; else as many columns as a row has
    tokens are counted from the left.

    Args:
        keep: bool ``[B, S]``, the attention mask.

    Returns:
        int64 ``[B]``; None if a row's tokens are not in one piece, or padding would be read.
    """
    count = keep.sum(axis=1)
    length = keep.shape[1]
    if keep.size == 0 or (count == 0).any():
        return None
    first = keep.argmax(axis=1)
    columns = np.arange(length)
    piece = (columns >= first[:, None]) & (columns < (first + count)[:, None])
    at = np.full(len(keep), length - 1) if keep[:, -1].all() else count - 1
    reads = (at >= first) & (at < first + count)
    return at if (piece == keep).all() and reads.all() else None


def _decoder(root: nn.Module) -> nn.Module | None:
    for path in ("model.language_model", "model"):
        found = part(root, path)
        if isinstance(found, nn.Module) and "layers" in found._modules:
            return found
    return None


def _positions(encoder: nn.Module, decoder: nn.Module, input: Inputs) -> np.ndarray | None:
    """Positions ``[3, B, S]`` that the encoder gives its decoder: it runs without the two."""
    seen: list[tuple[Tensor | None, torch.Size]] = []

    def look(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        seen.append((kwargs.get("position_ids"), embeds.shape))
        return _Stub(embeds[:, :0])

    given = {key: value for key, value in input.items() if key not in _PIXELS}
    with detour(decoder, look):
        encoder(**given, return_dict=True)
    if len(seen) != 1:
        return None
    found, (rows, length, _) = seen[0]
    if found is None:
        return np.broadcast_to(np.arange(length), (3, rows, length))
    positions = found.cpu().numpy()
    if positions.ndim == 2:
        positions = positions[None]
    # transformers 4.56 and later may put the positions of the text alone in front
    positions = positions[1:] if len(positions) == 4 else positions
    if len(positions) not in (1, 3) or positions.shape[2] != length:
        return None
    return np.broadcast_to(positions, (3, rows, length))


def _batch(engine: Engine, input: Inputs, keep: np.ndarray, positions: np.ndarray) -> list[Any]:
    """Prompts of the engine with the encoder's positions.

    Rotations are relative: a row that begins behind padding may as well begin at 0, where what
    prompts have in common looks the same.
    """
    batch = []
    for number, row in enumerate(engine.rows(input)):
        own = positions[:, number][:, keep[number]].astype(np.int64)
        batch.append(replace(engine.prompt(row), positions=own - own[:, :1].min()))
    return batch


# -- with gradients -----------------------------------------------------------------------------


def _without_head(encoder: nn.Module, root: nn.Module, input: Inputs) -> Tensor | None:
    """Hidden states ``[B, S, D]`` after the final norm: what the head is given."""
    head = root._modules.get("lm_head")
    if head is None:
        return None
    seen: list[Tensor] = []
    nothing = NoLogits(head)

    def keep(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden_states)
        return nothing(hidden_states)

    with detour(head, keep):
        encoder(**input, return_dict=True)
    if len(seen) != 1:
        raise PatchError(
            f"{type(root).__name__} called its lm_head {len(seen)} times in one forward; "
            "ume_models.patching.revert the report to use the original"
        )
    return seen[0]


# -- loss ---------------------------------------------------------------------------------------


def loss_of(model: MMEBModel, qry_reps: Any, tgt_reps: Any) -> Tensor:
    """The loss of ``MMEBModel.forward``: in-batch negatives of all ranks, times their number."""
    if model.is_ddp:
        qry_reps = model._dist_gather_tensor(qry_reps)
        tgt_reps = model._dist_gather_tensor(tgt_reps)
    if (
        _plain_loss(model.cross_entropy)
        and _official(model, "compute_similarity")
        and fits(qry_reps, tgt_reps, model.temperature)
        and len(qry_reps) == len(tgt_reps)
    ):
        loss = fused_cross_entropy(qry_reps, tgt_reps, model.temperature)
    else:
        scores = model.compute_similarity(qry_reps, tgt_reps).view(len(qry_reps), -1)
        target = torch.arange(len(scores), device=scores.device)
        # as in the original: right for as many targets as queries only
        target = target * (len(qry_reps) // len(tgt_reps))
        loss = model.cross_entropy(scores / model.temperature, target)
    return loss * model.world_size if model.is_ddp else loss


def _plain_loss(module: Any) -> bool:
    return (
        type(module) is nn.CrossEntropyLoss
        and (module.weight, module.reduction) == (None, "mean")
        and module.label_smoothing == 0.0
        and module.ignore_index < 0
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _forward(model: MMEBModel, original: Callable[[], Any], qry: Any, tgt: Any) -> Any:
    if not qry or not tgt or not undisturbed():
        return original()
    qry_reps, tgt_reps = model.encode_input(qry), model.encode_input(tgt)
    if qry_reps is None or tgt_reps is None:
        return {"qry_reps": qry_reps, "tgt_reps": tgt_reps}
    return loss_of(model, qry_reps, tgt_reps)


# -- classes and instances ----------------------------------------------------------------------


def _encode_of_class(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def encode_input(self: Any, input: Inputs) -> Any:
        found = encode(self, input)
        return original(self, input) if found is None else found

    return encode_input


def _forward_of_class(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, qry: Any = None, tgt: Any = None, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original, self, qry, tgt, *args, **kwargs)
        return _forward(self, run, qry, tgt)

    return forward


class EncodeInput(InstanceForward):
    """``encode_input`` of one ``MMEBModel``."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).encode_input(self.module, *args, **kwargs)  # type: ignore[attr-defined]

    def __call__(self, input: Inputs) -> Any:
        """``[B, D]``; see `encode`."""
        found = encode(cast(MMEBModel, self.module), input)
        return self.original(input) if found is None else found


class ModelForward(InstanceForward):
    """Forward of one ``MMEBModel``."""

    def __call__(self, qry: Any = None, tgt: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The loss, or the embeddings where only one side is given."""
        run = functools.partial(self.original, qry, tgt, *args, **kwargs)
        return _forward(cast(MMEBModel, self.module), run, qry, tgt)


_ENCODE = (
    "ume_models.patching.vlm2vec",
    "without gradients packed on the fast engine, up to the token that is pooled; else the encoder "
    "without logits and without all layers' states; the original for other backbones",
)
_LOSS = (
    "ume_kernels.contrastive_loss",
    "no matrix of scores; the original's arithmetic where queries and targets differ in number",
)
_LEFT = {
    "_pooling": "it is given the one token that it would read",
    "compute_similarity": "it is one product, which the library computes best; the loss of forward "
    "does without it",
}


def plan_instance(model: torch.nn.Module, strict: bool = True) -> tuple[list[Change], list[Entry]]:
    """Changes of one ``MMEBModel``; none where its class or the instance has them already.

    Raises:
        PatchError: it lacks a method of VLM2Vec's class, or (strict) has one not known here.
    """
    changes: list[Change] = []
    entries: list[Entry] = []
    for name, kind, (by, reason) in (
        ("encode_input", EncodeInput, _ENCODE),
        ("forward", ModelForward, _LOSS),
    ):
        of_class = getattr(type(model), name, None)
        if of_class is None or not isinstance(getattr(model, "encoder", None), nn.Module):
            raise PatchError(
                f"{type(model).__name__} has no {name} or no encoder; is this VLM2Vec's MMEBModel?"
            )
        if getattr(of_class, ORIGINAL, None) is not None or isinstance(
            vars(model).get(name), InstanceForward
        ):
            continue
        kinds = type(model).__mro__
        owner = next(kind for kind in kinds if name in vars(kind))
        strange = versions.unknown(
            of_class, owner, sys.modules[owner.__module__], VERSIONS, frozenset()
        )
        target = f"{type(model).__name__}.{name}"
        if strange is not None:
            told = "it" if strange.endswith(f".{name}") else f"{strange}, which it calls,"
            complaint = f"{told} is not one of the versions that were checked"
            entries.append(missing(target, complaint, "left alone"))
        else:
            entries.append(Entry(name, "replaced", by, reason))
            changes.append(Change(model, name, kind(model), entries[-1]))
    if strict:
        refuse_unknown(entries)
    return changes, entries


VERSIONS = {  # VLM2Vec main from 6ac33bb to 6e1e1d4, and its copy in PLUME
    "MMEBModel._dist_gather_tensor": "24077b8a72af62c1",
    "MMEBModel._pooling": "13f76be5ccc4c233",
    "MMEBModel.compute_similarity": "2096bf7229d34a3b",
    "MMEBModel.encode_input": "737d21c85b429b88",
    "MMEBModel.forward": "69e6f7f393bd9267",
}

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="vlm2vec",
        modules=("src.model.model",),
        marks=("MMEBModel.encode_input", "MMEBModel._dist_gather_tensor"),
        known=VERSIONS,
        targets=(
            Target("MMEBModel.encode_input", ("self", "input"), _encode_of_class, *_ENCODE),
            Target("MMEBModel.forward", ("self", "qry", "tgt"), _forward_of_class, *_LOSS),
        ),
        left_alone=tuple(
            Entry(f"src.model.model.MMEBModel.{name}", "left alone", reason=reason)
            for name, reason in _LEFT.items()
        ),
    ),
)
