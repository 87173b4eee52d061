"""How the modules of a repository are patched: a table of targets, checked before anything is set.

A recipe names modules, the attributes by which they are recognised, and targets with the
parameters their originals must have. An original is replaced only if its version is known (see
``versions``), or if a trial on a few numbers shows that it computes what its replacement does.
Everything is verified first; then all of it is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from ume_kernels.dispatch import BackendError
from ume_models.errors import PatchError
from ume_models.patching import versions
from ume_models.patching.changes import ABSENT, Change
from ume_models.patching.report import Action, Entry
from ume_models.patching.versions import ORIGINAL

Trial = Callable[[Any, Any], "str | None"]

_ROUNDING = 1e-4
"""Difference in float32, relative to the largest value, that the order of sums explains."""


@dataclass(frozen=True)
class Target:
    """One function, method, class or name of a module.

    Attributes:
        path: dotted, inside the module: ``"MMEBModel.encode_input"``.
        parameters: names of the leading parameters the original must have; empty where the
            target is not a function.
        make: gives the replacement, called with the original.
        by: what the replacement is, for the report.
        reason: what it does, and when the original still runs.
        action: of the report's entry.
        required: False where only some versions of the repository have it.
        trial: called with the original and the replacement; what differs, in words, or None. An
            exception in it is a complaint too. Without a trial the version must be known.
        only_adds: the original runs in any case, so that any version will do.
    """

    path: str
    parameters: tuple[str, ...]
    make: Callable[[Any], Any]
    by: str
    reason: str = ""
    action: Action = "replaced"
    required: bool = True
    trial: Trial | None = None
    only_adds: bool = False


@dataclass(frozen=True)
class Recipe:
    """Targets of one module of a repository.

    Attributes:
        name: of the repository: ``"plume-eval"``, ``"plume-train"``, ``"vlm2vec"``, ``"ume-r1"``.
        modules: names the module is imported under; ``"__main__"`` where it is run as a script.
        marks: attributes, dotted, that a module must have to be recognised: module names like
            ``src.loss`` are common.
        targets: what is replaced.
        left_alone: entries for what was considered and stays.
        without: attributes that the module meant does not have: scripts resemble each other.
        known: digests of the versions of targets and their helpers that were checked, by
            qualified name.
    """

    name: str
    modules: tuple[str, ...]
    marks: tuple[str, ...]
    targets: tuple[Target, ...]
    left_alone: tuple[Entry, ...] = ()
    without: tuple[str, ...] = ()
    known: Mapping[str, str] = field(default_factory=dict, hash=False)

    def recognises(self, module: ModuleType) -> bool:
        """Whether the module is the one meant."""
        others = any(hasattr(module, name) for name in self.without)
        return not others and all(find(module, mark) is not None for mark in self.marks)

    def lacking(self, module: ModuleType) -> tuple[str, ...]:
        """What a module that nearly is the one meant does not have; empty for any other module.

        Two names of a recipe are no coincidence.
        """
        if self.recognises(module) or any(hasattr(module, name) for name in self.without):
            return ()
        names = dict.fromkeys((*self.marks, *(t.path for t in self.targets if t.required)))
        absent = tuple(name for name in names if find(module, name) is None)
        return absent if len(names) - len(absent) >= 2 else ()


def plan(
    recipe: Recipe, module: ModuleType, importers: Sequence[ModuleType] = (), strict: bool = True
) -> tuple[list[Change], list[Entry]]:
    """What applying a recipe to a module would change; sets nothing.

    Args:
        recipe: the targets.
        module: a module the recipe recognises.
        importers: modules of the same repository: where they hold the same function under a name
            of their own, the name is rebound too, as an entry of its own.
        strict: a target that is missing, looks otherwise or computes something else is an error.

    Raises:
        PatchError: a target is missing, has another signature, computes something else, or was
            replaced by somebody else.
    """
    changes: list[Change] = []
    entries: list[Entry] = []
    for target in recipe.targets:
        name = f"{module.__name__}.{target.path}"
        found = find(module, target.path)
        if found is None:
            if target.required:
                entries.append(missing(name, "it does not exist"))
            continue
        owner, leaf, original = found
        if getattr(original, ORIGINAL, None) is not None:
            entries.append(Entry(name, "left alone", reason="already replaced by this package"))
            continue
        complaint = _mismatch(original, target.parameters, owner, module)
        if complaint:
            entries.append(missing(name, complaint))
            continue
        replacement = mark(target.make(original), original)
        complaint = tried(target.trial, original, replacement) or _unknown(
            recipe, target, original, owner, module
        )
        if complaint:
            entries.append(missing(name, complaint, "left alone"))
            continue
        entry = Entry(name, target.action, target.by, target.reason)
        changes.append(Change(owner, leaf, replacement, entry))
        entries.append(entry)
        if owner is not module or not target.parameters:
            continue  # what is no function (``np``) means something else in another module
        for importer in importers:
            for alias, value in vars(importer).items():
                if value is original and importer is not module:
                    again = Entry(
                        f"{importer.__name__}.{alias}",
                        target.action,
                        target.by,
                        f"the same function, imported from {module.__name__}",
                    )
                    changes.append(Change(importer, alias, replacement, again))
                    entries.append(again)
    if strict:
        refuse_unknown(entries)
    entries.extend(recipe.left_alone)
    return changes, entries


def mark(replacement: Any, original: Any) -> Any:
    """Make a replacement recognisable as ours."""
    vars(replacement)[ORIGINAL] = original
    return replacement


def difference(wanted: Any, got: Any) -> str | None:
    """For a trial: what an original returned against what its replacement did, in words.

    Args:
        wanted: of the original: a tensor, a number, or tuples, lists and dictionaries of them.
        got: of the replacement.
    """
    if isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor):
        if wanted.shape != got.shape:
            return f"it returns the shape {list(wanted.shape)}, expected {list(got.shape)}"
        return _gap(wanted.detach().double(), got.detach().double())
    if type(wanted) is not type(got):
        return f"it returns a {type(wanted).__name__}, expected a {type(got).__name__}"
    if isinstance(wanted, dict):
        if wanted.keys() != got.keys():
            return f"it returns ({', '.join(wanted)}), expected ({', '.join(got)})"
        return difference(list(wanted.values()), [got[key] for key in wanted])
    if isinstance(wanted, tuple | list):
        if len(wanted) != len(got):
            return f"it returns {len(wanted)} values, expected {len(got)}"
        found = (difference(a, b) for a, b in zip(wanted, got, strict=True))
        return next((complaint for complaint in found if complaint), None)
    if isinstance(wanted, int | float):
        return _gap(*torch.tensor([wanted, got], dtype=torch.float64))
    return None if wanted == got else f"it returns {wanted!r}, expected {got!r}"


def _gap(wanted: torch.Tensor, got: torch.Tensor) -> str | None:
    if not wanted.numel():
        return None
    gap, size = float((wanted - got).abs().max()), float(wanted.abs().max())
    if gap <= _ROUNDING * max(size, 0.01):  # not so with NaN either
        return None
    return f"it computes something else than the version known here (difference {gap:.1e})"


def tried(trial: Trial | None, original: Any, replacement: Any) -> str | None:
    """The complaint of a trial: run on the CPU, whatever the defaults, and with no trace of it."""
    if trial is None:
        return None
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            return trial(original, replacement)
    except BackendError:
        return None  # UME_BACKEND insists on one that only a GPU has: nothing to be learnt here
    except Exception as error:
        return f"it cannot be tried ({type(error).__name__}: {error})"


def _unknown(
    recipe: Recipe, target: Target, original: Any, owner: Any, module: ModuleType
) -> str | None:
    """The complaint about a version that was not checked and cannot be tried."""
    if target.trial is not None or target.only_adds:
        return None
    apart = frozenset(other.path for other in recipe.targets)
    name = versions.unknown(original, owner, module, recipe.known, apart)
    if name is None:
        return None
    what = "it" if name == versions.plain(original).__qualname__ else f"{name}, which it calls,"
    return f"{what} is not one of the versions that were checked"


def missing(name: str, complaint: str, action: Action = "missing") -> Entry:
    """The entry of a target that is missing or not known."""
    return Entry(name, action, reason=complaint, unknown=True)


def refuse_unknown(entries: Sequence[Entry]) -> None:
    """Raises PatchError, which names all targets that are missing or not known, if any is."""
    told = [f"{entry.target}: {entry.reason}" for entry in entries if entry.unknown]
    if told:
        raise PatchError(
            f"{'; '.join(told)}. This version of the repository is not known here: strict=False "
            "(UME_ACCELERATE=lenient with the environment variable) leaves that alone, lists it, "
            "and patches the rest"
        )


def find(module: ModuleType, path: str) -> tuple[Any, str, Any] | None:
    """Owner, last name and raw value (not bound) of a dotted path; None if it does not exist."""
    owner: Any = module
    *outer, leaf = path.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
        if owner is None:
            return None
    value = vars(owner).get(leaf, ABSENT) if hasattr(owner, "__dict__") else ABSENT
    return None if value is ABSENT else (owner, leaf, value)


def _mismatch(
    original: Any, parameters: Sequence[str], owner: Any, module: ModuleType
) -> str | None:
    """What is wrong with an original, in words."""
    if not parameters:
        return None
    function = original.__func__ if isinstance(original, classmethod | staticmethod) else original
    try:
        found = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return f"it is of type {type(original).__name__}, not a function"
    for place, name in enumerate(parameters):
        if place >= len(found) or found[place] != name:
            given = repr(found[place]) if place < len(found) else "nothing"
            return f"its parameter {place + 1} is {given}, expected {name!r}"
    home = getattr(inspect.unwrap(function), "__module__", None)
    here = {module.__name__, getattr(owner, "__module__", module.__name__)}
    if home is not None and home not in here:
        return f"it was replaced by {home}"
    return None
