"""Files that are whole or absent, whoever else writes them and whenever a process is killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ume_models.atomic import remove_leftovers, replacing, write_atomically


def leftover(path: Path, hours: float = 0.0) -> Path:
    """What a write of ``path`` leaves behind that was killed so long ago."""
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        temporary.unlink()
    temporary.write_bytes(b"half")
    then = time.time() - 3600 * hours
    os.utime(temporary, (then, then))
    return temporary


def test_two_writers_of_one_file_do_not_touch_each_others(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with replacing(path) as first:
        first.write_bytes(b"the first")
        with replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"the first"
    assert [*tmp_path.iterdir()] == [path]


def test_leftovers_are_found_by_the_names_of_their_files(tmp_path: Path) -> None:
    shard, other = leftover(tmp_path / "shard-1.json"), leftover(tmp_path / "scores.json")
    foreign = tmp_path / ".shard-2.partial"  # of another program
    foreign.write_bytes(b"")
    remove_leftovers(tmp_path, "shard-")
    assert {*tmp_path.iterdir()} == {other, foreign} and not shard.exists()
    remove_leftovers(tmp_path, "")
    assert [*tmp_path.iterdir()] == [foreign]
    remove_leftovers(tmp_path / "none", "")


def test_what_killed_writes_left_does_not_pile_up(tmp_path: Path) -> None:
    path = tmp_path / "model[1].safetensors"
    leftover(path, hours=2)
    at_work, other = leftover(path), leftover(tmp_path / "model1.safetensors", hours=2)
    write_atomically(path, b"whole")
    assert {*tmp_path.iterdir()} == {path, at_work, other}
