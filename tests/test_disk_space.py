"""Too little room on the disk is told before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ume_models.disk_space import require_space
from ume_models.errors import StoreError


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, 0)
    require_space(tmp_path, free // 2)
    with pytest.raises(StoreError, match=r"make room, or choose another folder with -o"):
        require_space(tmp_path, free + 10**13)


def test_both_figures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(total=100 * 10**9, free=12_300_000)
    monkeypatch.setattr("ume_models.disk_space.shutil.disk_usage", lambda folder: disk)
    require_space(tmp_path, 12_300_000)
    with pytest.raises(StoreError, match=r"least 34,500\.0 GB more, .* 12\.3 MB free"):
        require_space(tmp_path, 34_500 * 10**9)
    disk.total = disk.free = 0  # a file system that tells no sizes
    require_space(tmp_path, 10**9)
