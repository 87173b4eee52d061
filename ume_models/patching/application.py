"""``apply`` and ``revert``: one call for models, modules and whole repositories."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from ume_models.errors import PatchError
from ume_models.patching import changes as change_room
from ume_models.patching import models, repositories
from ume_models.patching.report import PatchReport


def apply(target: Any, *, strict: bool = True, **options: Any) -> PatchReport:
    """Speed up what is there, with the same numbers.

    Args:
        target: one of

            - a model: transformers' Qwen2-VL or Qwen2.5-VL (with or without the official latent
              adapter, bare or inside PEFT, DDP, FSDP, ``torch.compile``), or a VLM2Vec
              ``MMEBModel``. Only this instance changes. Option ``logits=False``: it is used as an
              embedder, so the language-model head returns nothing (``[B, S, 0]``);
            - a module of one of the repositories below, already imported;
            - the name of a repository: ``"plume-eval"``, ``"plume-train"``, ``"vlm2vec"``,
              ``"ume-r1"``. Its modules are imported where they are not yet;
            - ``"transformers"``: its own plug points, with ``attention=True`` and ``norms=True``.
        strict: a target that is missing or not as expected is an error; else it is listed.
        options: as above.

    Returns:
        What was done. Applying again changes nothing.

    Raises:
        PatchError: the target is not known, does not have the expected parts, was patched by
            another library, or cannot be patched now; nothing was changed.
        TypeError: an option that the target does not have.
    """
    _refuse_during_capture()
    if isinstance(target, nn.Module):
        _check_options(options, ("logits",))
        changes, entries = models.plan(target, strict=strict, **options)
        subject, recipe = type(models.unwrap(target)).__name__, "instance"
    elif isinstance(target, str) and target == "transformers":
        from ume_models.patching import plug_points  # knows transformers; nobody else needs it

        _check_options(options, ("attention", "norms"))
        changes, entries = plug_points.plan(strict=strict, **options)
        subject, recipe = "transformers", "plug points"
    elif isinstance(target, (str, ModuleType)):
        _check_options(options, ())
        subject, recipe = repositories.describe(target)
        changes, entries = repositories.plan(target, strict)
    else:
        raise PatchError(
            f"{type(target).__name__} is neither a model, nor a module, nor a name; pass a "
            f"torch.nn.Module, an imported module, or one of {', '.join(repositories.NAMES)}"
        )
    change_room.commit(changes)
    return PatchReport(subject, recipe, entries, changes)


def accelerate(model: torch.nn.Module, *, logits: bool = True, strict: bool = True) -> PatchReport:
    """Speed up a model that is loaded already; ``print`` the result to see what was done.

        report = ume_models.accelerate(model)
        ume_models.patching.revert(report)          # or revert(model)

    Only this instance changes, and nothing it is made of: its checkpoints, keys and classes stay.

    Args:
        model: transformers' Qwen2-VL or Qwen2.5-VL, with or without the official latent adapter,
            bare or inside PEFT, DDP, FSDP or ``torch.compile``; or VLM2Vec's ``MMEBModel``.
        logits: False if you only use its hidden states: ``logits`` are empty, ``[B, S, 0]``, and
            ``generate`` and ``labels`` are errors.
        strict: a part that is not as expected is an error; else it is listed and left alone.

    Returns:
        What was replaced, repaired and left alone, and why. Twice changes nothing.

    Raises:
        PatchError: the model is not known, was patched by another library, or cannot be patched
            now; nothing was changed. The message names the part and the remedy.
    """
    if isinstance(model, nn.Module):
        return apply(model, logits=logits, strict=strict)
    return apply(model, strict=strict)


def revert(done: PatchReport | nn.Module) -> None:
    """Put back the original objects.

    Args:
        done: the report of ``apply``; or a patched model, which also takes the replacements off
            of a copy, that has no report of its own. Twice is harmless.

    Raises:
        PatchError: somebody else replaced a target since; nothing was changed.
    """
    _refuse_during_capture()
    if isinstance(done, nn.Module):
        models.unpatch(done)
    elif not isinstance(done, PatchReport):
        raise PatchError(
            f"revert takes the report of apply, or the model, not {type(done).__name__}"
        )
    elif done.active:
        change_room.undo(done.changes)


def _check_options(given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        told = ", ".join(("strict", *known))
        raise TypeError(f"options are {told}; got {', '.join(unknown)}")


def _refuse_during_capture() -> None:
    if torch.compiler.is_compiling():
        raise PatchError("patching inside of torch.compile; patch before compiling")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise PatchError(
            "a CUDA graph is being captured: it would keep what runs now; patch before capturing"
        )
