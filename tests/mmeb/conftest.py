from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import ume_models


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Path:
    """A data root with all tasks; without pyarrow, in the layouts that need none."""
    from ume_models.mmeb.miniature import write_miniature

    root = tmp_path_factory.mktemp("data") / "miniature"
    write_miniature(root, tables="parquet" if importlib.util.find_spec("pyarrow") else "jsonl")
    return root


@pytest.fixture(scope="session")
def model():
    return ume_models.load(empty="reference", device="cpu")


@pytest.fixture(scope="session")
def reference_model():
    return ume_models.load(empty="reference", device="cpu", engine="reference")
