"""The stand-ins count as versions that were checked; copies of them elsewhere do not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ume_models.patching import versions

STANDINS = Path(__file__).resolve().parent / "standins"


def know_standins() -> None:
    """From now on in this process."""
    unknown, modelling_known = versions.unknown, versions.modelling_known

    def unknown_elsewhere(function: Any, owner: Any, module: Any, *told: Any) -> str | None:
        return None if _standin(module) else unknown(function, owner, module, *told)

    def known_here_too(name: str) -> bool:
        return _standin(sys.modules.get(name)) or modelling_known(name)

    versions.unknown, versions.modelling_known = unknown_elsewhere, known_here_too


def _standin(module: ModuleType | None) -> bool:
    return STANDINS in Path(getattr(module, "__file__", None) or "/").resolve().parents
