"""Result files: links, devices and folders under the name that the user gave."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ume_models.atomic import write_atomically
from ume_models.cli.output_file import write_output

Ume = Callable[..., Any]
WriteItems = Callable[..., Path]
FAKE_MODEL = Path(__file__).with_name("fake_model.py")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="no devices or links there")


@posix_only
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "results.json", tmp_path / "link.json"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_output(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert os.listdir(tmp_path / "far") == ["results.json"]


@posix_only
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for name in (Path(os.devnull), link):
        write_output(name, "text")
        assert Path(os.devnull).is_char_device()
    assert link.is_symlink()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match="/dev/full") as caught:
        write_output(Path("/dev/full"), "text")
    assert caught.value.errno == errno.ENOSPC
    assert Path("/dev/full").is_char_device()


def test_a_folder_is_named_before_any_work(
    ume: Ume, write_items: WriteItems, tmp_path: Path
) -> None:
    queries = write_items({"text": "a"})
    assert ume("embed", queries, "-o", tmp_path / "index").exit_code == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    search = ("search", "--index", tmp_path / "index", "--queries", queries, "-k", 1)
    for command in (
        (*search, "--json", folder),
        (*search, "--html", folder),
        ("demo", "--html", folder),
    ):
        result = ume(*command)
        assert result.exit_code == 1
        assert f"error: {folder}: is a folder" in result.stderr
        assert result.stdout == ""
    assert list(folder.iterdir()) == []


def test_a_failed_write_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "file", b"")
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.fixture
def search_command(ume: Ume, write_items: WriteItems, tmp_path: Path) -> list[str]:
    items = write_items({"text": "naïve \u2603", "id": "\u00e9"})
    assert ume("embed", items, "-o", tmp_path / "index").exit_code == 0
    arguments = ("search", "--index", tmp_path / "index", "--queries", items, "-k", 1)
    return [sys.executable, str(FAKE_MODEL), *map(str, arguments)]


def test_a_narrow_encoding_of_the_output_is_no_failure(
    search_command: list[str], child_environment: dict[str, str]
) -> None:
    output = subprocess.run(
        search_command,
        capture_output=True,
        check=False,
        env={**child_environment, "PYTHONIOENCODING": "ascii"},
    )
    assert output.returncode == 0, output.stderr
    assert rb"\u2603" in output.stdout
    assert rb"\xe9" in output.stdout


@posix_only
def test_a_closed_output_is_no_failure(
    search_command: list[str], child_environment: dict[str, str]
) -> None:
    output = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *search_command],
        stderr=subprocess.PIPE,
        check=False,
        env=child_environment,
    )
    assert output.returncode == 0, output.stderr
