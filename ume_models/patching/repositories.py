"""The repositories known here: recipes applied by name, by module, or as they are imported."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ume_models.atomic import write_atomically
from ume_models.errors import PatchError
from ume_models.patching import (
    adapter,
    changes,
    environment,
    hook,
    losses,
    plume_eval,
    recipes,
    ume_r1,
    vlm2vec,
)
from ume_models.patching.changes import Change
from ume_models.patching.recipes import Recipe, Target
from ume_models.patching.report import Entry, PatchReport

SCRIPT = "__main__"
PROCESSORS = "src.model.processor"

RECIPES: tuple[Recipe, ...] = (
    *plume_eval.RECIPES,
    *adapter.RECIPES,
    *losses.RECIPES,
    *vlm2vec.RECIPES,
    *ume_r1.RECIPES,
)
NAMES = tuple(dict.fromkeys(recipe.name for recipe in RECIPES))

_reports: list[PatchReport] = []
"""What automatic patching did in this process."""


def describe(target: str | ModuleType) -> tuple[str, str]:
    """Subject and recipe of a report.

    Raises:
        PatchError: no such repository, or a module that no recipe recognises.
    """
    if isinstance(target, str):
        if target not in NAMES:
            raise PatchError(
                f"{target!r} is not a repository known here; known are {', '.join(NAMES)}, and "
                "'transformers'. A checkpoint is loaded first: ume_models.load(path), or with "
                "transformers, and then the model is passed"
            )
        return target, target
    fitting = _fitting(target)
    if not fitting:
        _nearly([target], strict=True)
        raise PatchError(
            f"module {target.__name__}: no repository known here has such a module; known are "
            f"{', '.join(NAMES)}"
        )
    return target.__name__, fitting[0].name


def plan(target: str | ModuleType, strict: bool) -> tuple[list[Change], list[Entry]]:
    """Changes and entries of a repository, by its name, or of one module.

    Raises:
        PatchError: a target is missing, or none of the repository's modules can be imported.
    """
    if isinstance(target, ModuleType):
        return _plan([(recipe, target) for recipe in _fitting(target)], strict)
    pairs: list[tuple[Recipe, ModuleType]] = []
    others: list[ModuleType] = []
    own = [recipe for recipe in RECIPES if recipe.name == target]
    for recipe in own:
        found = [m for m in map(_loaded_or_imported, recipe.modules) if m is not None]
        fitting = [module for module in found if recipe.recognises(module)]
        pairs.extend((recipe, module) for module in fitting)
        others.extend(module for module in found if not fitting)
    entries = _nearly(others, strict)
    if not pairs and not entries:
        raise PatchError(f"{target}: {_whose(own, others)}")
    changes, told = _plan(pairs, strict)
    return changes, [*entries, *told]


def _whose(own: list[Recipe], found: list[ModuleType]) -> str:
    """Why none of a repository's modules is there."""
    theirs = [
        f"{module.__name__} was imported, but is that of {_fitting(module)[0].name!r}"
        for module in found
        if _fitting(module)
    ]
    if theirs:
        return f"{'; '.join(theirs)}; pass that name, or run in this repository's folder"
    names = dict.fromkeys(n for recipe in own for n in recipe.modules if n != SCRIPT)
    return (
        f"none of its modules can be imported ({', '.join(names)}); run in the repository's "
        "folder, or put it on PYTHONPATH"
    )


def _nearly(modules: Iterable[ModuleType], strict: bool) -> list[Entry]:
    """What modules lack that are nearly those of a repository.

    Raises:
        PatchError: there is such a module, and strict.
    """
    entries = []
    for module in modules:
        for recipe in () if _fitting(module) else RECIPES:
            lacking = recipe.lacking(module) if _named(recipe, module) else ()
            for name in lacking:
                target = f"{module.__name__}.{name}"
                complaint = f"it does not exist; the rest looks like {recipe.name!r}"
                entries.append(recipes.missing(target, complaint))
    if strict:
        recipes.refuse_unknown(entries)
    return entries


def _loaded_or_imported(name: str) -> ModuleType | None:
    if name in sys.modules or name == SCRIPT:
        return sys.modules.get(name)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _fitting(module: ModuleType) -> list[Recipe]:
    return [r for r in RECIPES if _named(r, module) and r.recognises(module)]


def _named(recipe: Recipe, module: ModuleType) -> bool:
    return (hook.known_as(module.__name__) or module.__name__) in recipe.modules


def _plan(pairs: list[tuple[Recipe, ModuleType]], strict: bool) -> tuple[list[Change], list[Entry]]:
    planned: list[Change] = []
    entries: list[Entry] = []
    for recipe, module in pairs:
        found, told = recipes.plan(recipe, module, _importers(module), strict)
        planned.extend(found)
        entries.extend(told)
    return planned, entries


def _importers(module: ModuleType) -> list[ModuleType]:
    """Loaded modules of the same repository: of its packages and scripts, wherever they are."""
    top = module.__name__.split(".")[0]
    return [
        other
        for name, other in list(sys.modules.items())
        if other is not None
        and other is not module
        and (name == SCRIPT or hook.known_as(name) or name.split(".")[0] == top)
        and isinstance(other, ModuleType)
    ]


# -- automatic ---------------------------------------------------------------------------------


def automatic_reports() -> list[PatchReport]:
    """Reports of what was patched as it was imported, in order."""
    return list(_reports)


def before_loading(module: ModuleType) -> None:
    """Supply what a repository's processors import and this environment does not have."""
    if hook.mode() == "off" or hook.known_as(module.__name__) != PROCESSORS:
        return
    get_source = getattr(getattr(module, "__loader__", None), "get_source", None)
    # Names like that of the module are common: only the one meant has that function.
    if get_source is not None and "def load_processor(" in (get_source(module.__name__) or ""):
        _note(environment.supply())


def _note(entries: list[Entry]) -> None:
    if entries:
        _reports.append(PatchReport("what is missing here", "environment", entries))
        _announce(_reports[-1])


def module_loaded(module: ModuleType) -> None:
    """Patch a module of a repository; called by the import hook.

    Raises:
        PatchError: it is recognised, but a target is not as expected (unless lenient).
    """
    if hook.mode() == "off":
        return
    if hook.known_as(module.__name__) == PROCESSORS:
        home = module.__name__.removesuffix("processor")
        _note(environment.adapt_processors(f"{home}vlm_backbone."))
    for recipe in _triggers(module):  # bookkeeping: they change no number, so no report has them
        planned, _ = recipes.plan(recipe, module, strict=False)
        changes.commit(planned)
    _apply_automatically(module)


def patch_script() -> None:
    """Patch the functions of the script that is running, once they exist."""
    script = sys.modules.get(SCRIPT)
    if script is not None:
        _apply_automatically(script)


def _apply_automatically(module: ModuleType) -> None:
    mode = hook.mode()
    if mode == "off":
        return
    strict, fitting = mode == "strict", _fitting(module)
    planned, entries = _plan([(recipe, module) for recipe in fitting], strict)
    entries = [*_nearly([module], strict), *entries]
    told = {entry.target for report in _reports for entry in report.entries}
    if not planned and not any(e.unknown and e.target not in told for e in entries):
        return
    changes.commit(planned)
    name = fitting[0].name if fitting else "not recognised"
    report = PatchReport(module.__name__, name, entries, planned)
    _reports.append(report)
    _announce(report)


def _announce(report: PatchReport) -> None:
    """Say on standard error what was done, and keep it where UME_ACCELERATE_REPORT says."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"ume: {report.summary()}", file=sys.stderr)
    for entry in report.entries:
        if entry.unknown or entry.target == "attn_implementation":
            print(f"ume: {entry.action}: {entry.target}: {entry.reason}", file=sys.stderr)
    path = os.environ.get("UME_ACCELERATE_REPORT")
    if path:
        body = ",\n".join(one.to_json() for one in _reports)
        try:
            write_atomically(Path(path), f"[{body}]\n".encode())
        except OSError as error:  # a report must not end the run it reports on
            print(f"ume: UME_ACCELERATE_REPORT: not written: {error}", file=sys.stderr)


_TRIGGERS = (
    ("src.model.processor", "load_processor", ("model_args",)),
    ("src.data.collator.eval_collator", "MultimodalEvalDataCollator.__init__", ("self",)),
    ("src.model.latent_moe", "LatentMoETransition.__init__", ("self", "hidden_size")),
    ("plume.train.latent_moe", "LatentMoETransition.__init__", ("self", "hidden_size")),
    ("plume.data.data_plume", "make_plume_data_module", ()),
)


def _triggers(module: ModuleType) -> list[Recipe]:
    """Recipes that make a module's functions patch the script that calls them."""
    return [
        Recipe(
            name="auto",
            modules=(name,),
            marks=(path.split(".")[0],),
            targets=(
                Target(
                    path,
                    parameters,
                    make=_trigger,
                    by="itself",
                    reason="its first call patches the functions of the script that is running",
                    required=False,
                    only_adds=True,
                ),
            ),
        )
        for name, path, parameters in _TRIGGERS
        if name == hook.known_as(module.__name__) and hasattr(module, path.split(".")[0])
    ]


def _trigger(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def first_patch_script(*args: Any, **kwargs: Any) -> Any:
        patch_script()
        return original(*args, **kwargs)

    return first_patch_script
