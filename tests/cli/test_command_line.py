"""What holds for the command line as a whole: help, version, start-up, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import ume_models
from ume_kernels.dispatch import Obstacle, explain
from ume_models.cli import app

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


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(ume: Ume, flag: str, child_environment: dict[str, str]) -> None:
    result = ume(flag)
    assert result.exit_code == 0
    assert result.stdout == f"ume {ume_models.__version__}\n"
    for module in ("ume_models", "ume_models.cli"):
        command = [sys.executable, "-m", module, flag]
        output = subprocess.check_output(command, text=True, env=child_environment)
        assert output == result.stdout


def test_no_help_shows_the_type_of_a_flag() -> None:
    def check(command: Any, *path: str) -> None:
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0
        assert "bool" not in result.stdout.lower()
        for name, inner in getattr(command, "commands", {}).items():
            check(inner, *path, name)

    check(typer.main.get_command(app))


def test_quiet_and_verbose(ume: Ume, tmp_path: Path) -> None:
    def said(*flags: str) -> str:
        index = tmp_path / "-".join(["index", *flags])
        command = [*flags, "embed", "-", "-o", str(index)]
        result = CliRunner().invoke(app, command, input='{"text": "a"}')
        assert result.exit_code == 0 and "1 embedding" in result.stdout
        return result.stderr

    quiet, plain, verbose = (set(said(*flags).splitlines()) for flags in (["-q"], [], ["-v"]))
    assert quiet < plain and any("1 of 1 items" in line for line in plain - quiet)
    assert any("moe_transition" in line for line in verbose) and quiet < verbose
    assert any("demonstration" in line for line in quiet)  # warnings stay


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["doctor"], ["--help"], ["eval", "list"]])
def test_a_full_output_is_one_line(arguments: list[str], child_environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ume_models", *arguments]
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=child_environment
        )
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: ")


def test_a_profile_without_clips_is_refused_early(ume: Ume, tmp_path: Path) -> None:
    html, out = tmp_path / "demo.html", tmp_path / "run"
    for command in (
        ("demo", "--html", html),
        ("eval", "run", "--data", "miniature", "-o", out, "--tasks", "CIRR,V-RET"),
    ):
        result = ume(*command, "--model", "mine", "--family", "gme")
        assert result.exit_code == 1
        assert "--profile vlm2vec" in result.stderr.splitlines()[-1]
    assert not html.exists() and not (out / "run.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [["embed", "items.jsonl", "-o", ""], ["demo", "--html", ""], ["eval", "run", "-o", ""]],
)
def test_an_empty_name_of_a_result_is_refused(ume: Ume, arguments: list[str]) -> None:
    assert ume(*arguments).exit_code == 2


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
