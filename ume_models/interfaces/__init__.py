"""Interfaces of sentence-transformers, mteb, transformers, LangChain and LlamaIndex.

None of these libraries is needed until its interface is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ume_models.interfaces.mteb import MtebEncoder
    from ume_models.interfaces.sentence_transformers import sentence_transformer
    from ume_models.interfaces.text_embeddings import UmeEmbeddings
    from ume_models.interfaces.transformers_auto import register as register_auto_classes
    from ume_models.interfaces.transformers_auto import save_for_auto

__all__ = [
    "MtebEncoder",
    "UmeEmbeddings",
    "register_auto_classes",
    "save_for_auto",
    "sentence_transformer",
]

_LAZY = {
    "MtebEncoder": ("mteb", "MtebEncoder"),
    "UmeEmbeddings": ("text_embeddings", "UmeEmbeddings"),
    "register_auto_classes": ("transformers_auto", "register"),
    "save_for_auto": ("transformers_auto", "save_for_auto"),
    "sentence_transformer": ("sentence_transformers", "sentence_transformer"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
