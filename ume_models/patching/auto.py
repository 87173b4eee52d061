"""``import ume_models.patching.auto`` patches the repositories known here as they are imported.

It may stand anywhere in a script: modules that are loaded already are patched now, later ones
when they are imported, and the script's own functions when it first calls the repository (which
needs them to exist). With ``UME_ACCELERATE=1`` in the environment no line is needed. What was done
is said on standard error, by rank 0, and by `reports`. ``UME_ACCELERATE=0`` switches it off,
``lenient`` patches what is recognised of an unknown version, ``UME_ACCELERATE_REPORT=FILE`` keeps
the reports as JSON.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ume_models.patching import hook

if TYPE_CHECKING:
    from ume_models.patching.report import PatchReport

__all__ = ["reports"]


def reports() -> list[PatchReport]:
    """What was patched automatically in this process, in order."""
    if "ume_models.patching.repositories" not in sys.modules:
        return []
    from ume_models.patching.repositories import automatic_reports

    return automatic_reports()


if hook.install():
    _loaded = [module for name, module in list(sys.modules.items()) if hook.known_as(name)]
    if _loaded:
        from ume_models.patching.repositories import module_loaded, patch_script

        for _module in _loaded:
            module_loaded(_module)
        patch_script()
