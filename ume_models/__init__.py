"""Fast, exact inference for universal multimodal embedders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ume_kernels.version import __version__
    from ume_models.embedders.loading import load
    from ume_models.embedders.plume import PlumeForEmbedding
    from ume_models.embedders.registry import families, profiles
    from ume_models.patching.application import accelerate

__all__ = ["PlumeForEmbedding", "__version__", "accelerate", "families", "load", "profiles"]

_LAZY = {
    "__version__": "ume_kernels.version",
    "load": "ume_models.embedders.loading",
    "PlumeForEmbedding": "ume_models.embedders.plume",
    "families": "ume_models.embedders.registry",
    "profiles": "ume_models.embedders.registry",
    "accelerate": "ume_models.patching.application",
}

_ROOMS = ("encode", "interfaces", "patching", "processing", "retrieval", "store")
"""Modules that ``import ume_models`` is enough for."""


def __getattr__(name: str) -> Any:
    # torch and transformers are imported when a model is, so that `ume --help` stays quick
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    if name in _ROOMS:
        from importlib import import_module

        return import_module(f"ume_models.{name}")
    raise AttributeError(f"module 'ume_models' has no attribute {name!r}")
