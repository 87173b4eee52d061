"""Nothing is imported before it is used, and missing libraries are named with the remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ume_models.interfaces as interfaces

LIBRARIES = ("sentence_transformers", "mteb", "langchain_core", "llama_index")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_names_are_found_where_they_are_said_to_be():
    for name in interfaces.__all__:
        assert callable(getattr(interfaces, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        interfaces.nothing  # noqa: B018


def test_importing_is_light():
    code = "import sys, ume_models, ume_models.interfaces as i; print('torch' in sys.modules)"
    assert run(code) == "False"
    modules = ("sentence_transformers", "mteb", "text_embeddings")
    code = (
        "import sys\n"
        + "\n".join(f"import ume_models.interfaces.{name}" for name in modules)
        + f"\nprint([n for n in {LIBRARIES!r} + ('transformers.models.auto.modeling_auto',)"
        " if n in sys.modules])"
    )
    assert run(code) == "[]"


def test_importing_registers_nothing():
    code = (
        "import ume_models.interfaces.transformers_auto\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "print('ume_plume' in CONFIG_MAPPING)"
    )
    assert run(code) == "False"


def test_missing_libraries_are_named(monkeypatch, model):
    parts = [name for name in sys.modules if name.split(".")[0] in LIBRARIES]
    for name in (*LIBRARIES, *parts):  # a part that another test imported is found by itself
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "llama_index.core.embeddings.multi_modal_base", None)
    embeddings = interfaces.UmeEmbeddings(model)
    for call, remedy in (
        (lambda: interfaces.sentence_transformer(model), "pip install 'sentence-transformers"),
        (embeddings.as_langchain, "pip install langchain-core"),
        (embeddings.as_llama_index, "pip install llama-index-core"),
        (lambda: interfaces.MtebEncoder(model).mteb_model_meta, "pip install 'mteb"),
    ):
        with pytest.raises(ImportError, match=remedy):
            call()
