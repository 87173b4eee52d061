"""ume_kernels.tuning: which configuration applies, and bad tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ume_kernels import tuning

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "room" / "tuning"
    target.mkdir(parents=True)
    monkeypatch.setattr(tuning, "_HERE", tmp_path)
    monkeypatch.setattr(tuning, "_device_file", lambda index: "nvidia_h200.json")
    for cached in (tuning._table, tuning._config):
        cached.cache_clear()
    write(
        target / "default.json",
        fc1=[entry(4, BLOCK_N=8), entry(64, BLOCK_N=16), entry(None, BLOCK_N=64)],
        fc2=[entry(None, BLOCK_N=128)],
    )
    yield target
    for cached in (tuning._table, tuning._config):
        cached.cache_clear()


def entry(max_rows: int | None, **values: int) -> dict[str, Any]:
    return {"max_rows": max_rows, **values}


def write(path: Path, **kernels: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"device": path.stem, "kernels": kernels}))


@pytest.mark.parametrize(
    ("rows", "block"), [(1, 8), (4, 8), (5, 16), (64, 16), (65, 64), (100_000, 64)]
)
def test_the_first_entry_that_is_large_enough(rows: int, block: int) -> None:
    assert tuning.config("room", "fc1", rows, CPU) == {"BLOCK_N": block}


def test_a_device_file_goes_before_the_default(folder: Path) -> None:
    write(folder / "nvidia_h200.json", fc1=[entry(None, BLOCK_N=256)])
    tuning._table.cache_clear()
    assert tuning.config("room", "fc1", 1, GPU) == {"BLOCK_N": 256}
    assert tuning.config("room", "fc2", 1, GPU) == {"BLOCK_N": 128}, "not named there: the default"
    assert tuning.config("room", "fc1", 1, CPU) == {"BLOCK_N": 8}


def test_a_device_without_file_takes_the_default() -> None:
    assert tuning.config("room", "fc1", 1, GPU) == {"BLOCK_N": 8}


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        tuning.config("room", "fc1", 1, CPU)["BLOCK_N"] = 1  # type: ignore[index]


def test_shipped_lists_everything(folder: Path) -> None:
    write(folder / "nvidia_h200.json", fc1=[entry(None, BLOCK_N=256)])
    assert [(file, kernel, dict(e)) for file, kernel, e in tuning.shipped("room")] == [
        ("default", "fc1", entry(4, BLOCK_N=8)),
        ("default", "fc1", entry(64, BLOCK_N=16)),
        ("default", "fc1", entry(None, BLOCK_N=64)),
        ("default", "fc2", entry(None, BLOCK_N=128)),
        ("nvidia_h200", "fc1", entry(None, BLOCK_N=256)),
    ]


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match=r"no configuration of 'fc3' in room/tuning"):
        tuning.config("room", "fc3", 1, CPU)
    with pytest.raises(KeyError, match=r"'fc1' in hall/tuning"):
        tuning.config("hall", "fc1", 1, CPU)


@pytest.mark.parametrize("entries", [[], [entry(4, BLOCK_N=8)]])
def test_a_table_with_a_gap_is_named(folder: Path, entries: list[dict[str, Any]]) -> None:
    write(folder / "default.json", fc1=entries)
    tuning._table.cache_clear()
    with pytest.raises(ValueError, match=r"default\.json: the last entry of 'fc1' must have max_r"):
        tuning.config("room", "fc1", 1, CPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kernels": {"fc1": [{"BLOCK_N": 8}]}}'])
def test_a_malformed_table_is_named(folder: Path, text: str) -> None:
    (folder / "default.json").write_text(text)
    tuning._table.cache_clear()
    with pytest.raises(ValueError, match=r"default\.json"):
        tuning.config("room", "fc1", 1, CPU)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "nvidia_h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3.json"),
    ],
)
def test_file_names(name: str, file: str) -> None:
    assert tuning.device_file(name) == file
