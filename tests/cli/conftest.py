"""The command line with a stand-in for the model, and folders of items to run it on."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import ume_models
import ume_models.encode
from ume_models.cli import app

# With these set, rich and typer write colours to anything.
COLOR_SWITCHES = ("FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS")
FAKE_MODEL = Path(__file__).with_name("fake_model.py")


@pytest.fixture(scope="session")
def fake_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_model", FAKE_MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ume(monkeypatch: pytest.MonkeyPatch, fake_model: ModuleType) -> Callable[..., Any]:
    """Runs ``ume`` in this process with the stand-in; the result has exit code and output."""
    monkeypatch.setattr(ume_models, "load", fake_model.load, raising=False)
    monkeypatch.setattr(ume_models.encode, "encode_detailed", fake_model.make_encoder())
    for name in ("UME_DEBUG", *COLOR_SWITCHES):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment in which another Python imports the same packages as this one."""
    plain = {key: value for key, value in os.environ.items() if key not in COLOR_SWITCHES}
    return {**plain, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}


@pytest.fixture
def write_items(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (JSON values or raw strings) to a file of items."""

    def write(*lines: object, name: str = "items.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with red.png, green.png, blue.png and a truncated torn.png."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (56, 84), name).save(folder / f"{name}.png")
    noise = Image.effect_noise((64, 64), 80)
    noise.save(folder / "torn.png")
    whole = (folder / "torn.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    return folder
