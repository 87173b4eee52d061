"""Notices when a repository's module is imported. Nothing but the standard library is used here:
with UME_ACCELERATE set, every Python process of the environment runs it at its start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = (
    # PLUME's evaluation, and VLM2Vec, whose layout it has
    "eval_twomode",
    "eval",
    "src.model.latent_moe",
    "src.model.model",
    "src.model.processor",
    "src.data.collator.eval_collator",
    "src.loss",
    "src.grad_cache.loss",
    # PLUME's training
    "plume.train.latent_moe",
    "plume.train.train_plume",
    "plume.data.data_plume",
)
"""Import names of the modules that recipes know (a test compares the two)."""

SCRIPTS_IMPORT = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
"""What scripts import a name from that transformers 5 does not have."""

VARIABLE = "UME_ACCELERATE"
_MODES = {
    "": "strict",
    "1": "strict",
    "true": "strict",
    "yes": "strict",
    "on": "strict",
    "strict": "strict",
    "lenient": "lenient",
    "0": "off",
    "false": "off",
    "no": "off",
    "off": "off",
}


def known_as(name: str) -> str | None:
    """The entry of WATCHED a module's import name stands for; it may lie in further packages."""
    return next((n for n in WATCHED if n == name or ("." in n and name.endswith(f".{n}"))), None)


def mode() -> str:
    """``"strict"``, ``"lenient"`` or ``"off"``, by the environment variable UME_ACCELERATE.

    Another value switches it off and is said once: this runs when any Python of the environment
    starts, where an exception would be a page of traceback.
    """
    value = os.environ.get(VARIABLE, "")
    found = _MODES.get(value.strip().lower())
    if found is None:
        found = "off"
        if value not in _told:
            _told.add(value)
            print(
                f"ume: {VARIABLE}={value!r} is not 1, lenient or 0: nothing is accelerated",
                file=sys.stderr,
            )
    return found


_told: set[str] = set()


class _Finder:
    """First of ``sys.meta_path``: finds nothing itself, but is told when a module was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if known_as(name) is None and name != SCRIPTS_IMPORT:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _listen(spec)
                return spec
        return None


def _listen(spec: ModuleSpec) -> None:
    """Have a module's loader, which is its own, report when it has executed it."""
    loader: Any = spec.loader
    execute: Callable[[ModuleType], None] | None = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def execute_and_tell(module: ModuleType) -> None:
        # Imported here: now the repository has imported torch itself.
        if module.__name__ == SCRIPTS_IMPORT:
            from ume_models.patching.environment import supply_for_scripts

            execute(module)
            supply_for_scripts()
            return
        from ume_models.patching.repositories import before_loading, module_loaded

        before_loading(module)
        execute(module)
        module_loaded(module)

    loader.exec_module = execute_and_tell


_finder = _Finder()


def install() -> bool:
    """Begin to watch imports; False if it is switched off. Twice is harmless."""
    if mode() == "off":
        return False
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return True


def uninstall() -> None:
    """Stop watching; what was patched stays patched."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
