"""The CUDA part of the build: what each source is compiled for."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; it writes build files without a compiler."""
    spec = importlib.util.spec_from_file_location("ume_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "cxx_compiler", lambda: "c++")
    monkeypatch.setattr(module, "openmp_flag", lambda cxx: "-fopenmp")
    monkeypatch.delenv("UME_CUDA_ARCHS", raising=False)
    return module


def options(build: ModuleType, folder: Path, nvcc: str | None) -> tuple[str, dict[str, str]]:
    """The build file, and the architectures of every CUDA source in it."""
    file = build.write_ninja(folder / "_C.so", folder / "objects", nvcc)
    lines = file.read_text().splitlines()
    found = {}
    for line, following in pairwise(lines):
        if ": nvcc " in line:
            name, _, value = following.strip().partition(" = ")
            assert name == "gencode"
            found[Path(line.split(": nvcc ")[1]).stem] = value
    return "\n".join(lines), found


def test_hopper_sources_are_for_hopper_alone(build: ModuleType, tmp_path: Path) -> None:
    text, found = options(build, tmp_path, "nvcc")
    assert "-DUME_WITH_SM90 " in text
    hopper = {name for name in found if name.endswith("_sm90")}
    assert hopper >= {"contrastive_loss_sm90", "similarity_topk_sm90"}
    for name, value in found.items():
        if name in hopper:
            assert value == "-gencode=arch=compute_90a,code=sm_90a"
        else:
            assert value == (
                "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 "
                "-gencode=arch=compute_90,code=compute_90"
            )


def test_other_architectures_leave_them_out(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UME_CUDA_ARCHS", "80; 89")
    text, found = options(build, tmp_path, "nvcc")
    assert "UME_WITH_SM90" not in text
    assert not [name for name in found if name.endswith("_sm90")]
    assert found["contrastive_loss_sm80"].endswith("-gencode=arch=compute_89,code=compute_89")
    assert "arch=compute_80,code=sm_80" in found["contrastive_loss_sm80"]


def test_no_cuda(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_CUDA_ARCHS", "nonsense")  # not read
    text, found = options(build, tmp_path, None)
    assert not found
    assert "UME_WITH_CUDA" not in text


@pytest.mark.parametrize("value", ["sm_80", "80,90", "75", ";"])
def test_architectures_that_cannot_be(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("UME_CUDA_ARCHS", value)
    with pytest.raises(build.BuildError, match=r"UME_CUDA_ARCHS .*80;90"):
        options(build, tmp_path, "nvcc")
