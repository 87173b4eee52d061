"""What holds for the command line as a whole: help, version, start-up, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import ume_models
from ume_kernels.dispatch import Obstacle, explain

Ume = Callable[..., Any]


def test_help_lists_every_command_and_loads_nothing_heavy(
    child_environment: dict[str, str],
) -> None:
    code = (
        "import sys\n"
        "from ume_models.cli import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment,
    )
    assert output.returncode == 0, output.stderr
    for command in ("demo", "embed", "search", "doctor"):
        assert command in output.stdout
    assert "\x1b" not in output.stdout


@pytest.mark.parametrize("command", ["demo", "embed", "search", "doctor"])
def test_help_of_a_command_has_an_explanation_and_defaults(ume: Ume, command: str) -> None:
    result = ume(command, "--help")
    assert result.exit_code == 0
    if command != "doctor":
        assert f"ume {command} " in result.stdout  # an example
        assert "default:" in result.stdout


def test_help_of_embed_tells_what_is_not_noticed(ume: Ume) -> None:
    text = " ".join(ume("embed", "--help").stdout.split())
    assert "Media files are known by path, not by content: if one changed, --overwrite." in text
    assert "Duplicate ids always stop the run." in text


def test_version(ume: Ume) -> None:
    result = ume("--version")
    assert result.exit_code == 0
    assert result.stdout == f"ume {ume_models.__version__}\n"


def test_doctor_tells_versions_devices_and_operations(ume: Ume) -> None:
    import torch

    result = ume("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["usable"] is (result.exit_code == 0)
    versions = {finding["name"]: finding["value"] for finding in report["versions"]}
    assert versions["torch"] == torch.__version__
    assert versions["python"].startswith(".".join(map(str, sys.version_info[:3])))
    operations = {finding["name"]: finding["value"] for finding in report["operations"]}
    assert operations == {r.op: f"{r.backend.value}: {r.reason}" for r in explain()}
    plain = ume("doctor")
    assert plain.exit_code == result.exit_code
    assert torch.__version__ in plain.stdout
    assert "\x1b" not in plain.stdout


def test_doctor_tells_what_is_missing_and_how_to_get_it(
    ume: Ume, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ume_kernels import dispatch

    def absent(tensors: object) -> Obstacle:
        return Obstacle("the compiler [x] is absent", missing="compiler", remedy="apt install it")

    monkeypatch.setitem(
        dispatch._OPERATIONS,
        "decode",
        {dispatch.Backend.CUDA: absent, dispatch.Backend.TORCH: dispatch.always},
    )
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = ume("doctor")
    assert result.exit_code == 1
    assert "no cuda: the compiler [x] is absent" in result.stdout
    assert "apt install it" in result.stdout
    assert "pip install --upgrade tokenizers" in result.stdout
    assert "not usable" in result.stdout


def test_an_unknown_backend_is_told_without_a_traceback(
    ume: Ume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UME_BACKEND", "abacus")
    result = ume("doctor")
    assert result.exit_code == 1
    assert "unknown backend 'abacus'" in result.stdout
    assert isinstance(result.exception, SystemExit)
