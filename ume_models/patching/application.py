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
        changes, entries = models.plan(target, strict=strict, **options)
        subject, recipe = type(models.unwrap(target)).__name__, "instance"
    elif isinstance(target, str) and target == "transformers":
        from ume_models.patching import plug_points  # knows transformers; nobody else needs it

        changes, entries = plug_points.plan(strict=strict, **options)
        subject, recipe = "transformers", "plug points"
    elif isinstance(target, (str, ModuleType)):
        if options:
            raise TypeError(f"a repository has no options, got {', '.join(options)}")
        subject, recipe = repositories.describe(target)
        changes, entries = repositories.plan(target, strict)
    else:
        raise PatchError(
            f"{type(target).__name__} is neither a model, nor a module, nor a name; pass a "
            f"torch.nn.Module, an imported module, or one of {', '.join(repositories.NAMES)}"
        )
    change_room.commit(changes)
    return PatchReport(subject, recipe, entries, changes)


def accelerate(model: Any, **options: Any) -> PatchReport:
    """``apply`` under the name most people look for; ``print`` the result to see what was done."""
    return apply(model, **options)


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
        done.active = False


def _refuse_during_capture() -> None:
    if torch.compiler.is_compiling():
        raise PatchError("patching inside of torch.compile; patch before compiling")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise PatchError(
            "a CUDA graph is being captured: it would keep what runs now; patch before capturing"
        )
