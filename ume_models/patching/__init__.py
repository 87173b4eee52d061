"""Speed up models and repositories that exist already: apply, report, revert.

    report = ume_models.accelerate(model)       # an instance; nothing global changes
    print(report)                               # what was replaced, repaired, left alone, and why
    ume_models.patching.revert(report)

An unmodified script: ``import ume_models.patching.auto``, or ``UME_ACCELERATE=1``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ume_models.errors import PatchError
    from ume_models.patching.application import accelerate, apply, revert
    from ume_models.patching.report import Entry, PatchReport

__all__ = ["Entry", "PatchError", "PatchReport", "accelerate", "apply", "revert"]

_LAZY = {
    "Entry": "ume_models.patching.report",
    "PatchError": "ume_models.errors",
    "PatchReport": "ume_models.patching.report",
    "accelerate": "ume_models.patching.application",
    "apply": "ume_models.patching.application",
    "revert": "ume_models.patching.application",
}


def __getattr__(name: str) -> Any:
    # The start-up hook imports this package into every process: it must cost nothing.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ume_models.patching' has no attribute {name!r}")
