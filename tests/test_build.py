"""The build: compiler choice, UME_BUILD_CUDA, and the modules that come out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ume_kernels.version

ROOT = Path(__file__).resolve().parent.parent
BUILD = [sys.executable, "setup.py", "build_ext"]

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")


@pytest.fixture
def build() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ume_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(folder: Path, name: str) -> Path:
    file = folder / name
    file.write_text("#!/bin/sh\nexit 1\n")
    file.chmod(0o755)
    return file


def test_version_is_stated_once(build: ModuleType) -> None:
    assert build.version() == ume_kernels.version.__version__


def test_cuda_is_automatic(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("UME_BUILD_CUDA", raising=False)
    assert build.nvcc_compiler() is None
    nvcc = program(tmp_path, "nvcc")
    assert build.nvcc_compiler() == str(nvcc)
    monkeypatch.setenv("UME_BUILD_CUDA", "1")
    assert build.nvcc_compiler() == str(nvcc)
    monkeypatch.setenv("UME_BUILD_CUDA", "0")
    assert build.nvcc_compiler() is None


def test_cuda_insisted_on_without_nvcc(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("UME_BUILD_CUDA", "1")
    with pytest.raises(build.BuildError, match=r"nvcc is not on PATH.*UME_BUILD_CUDA=0"):
        build.nvcc_compiler()
    monkeypatch.setenv("UME_BUILD_CUDA", "yes")
    with pytest.raises(build.BuildError, match="'yes' is not one of 0, 1, auto"):
        build.nvcc_compiler()


def test_no_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*apt-get install g\+\+"):
        build.cxx_compiler()
    program(tmp_path, "clang++")
    assert build.cxx_compiler() == "clang++"


def compile_module(target: Path, cuda: str) -> Path:
    """Build as pip would, but into `target`; returns the module's file."""
    done = subprocess.run(
        [*BUILD, f"--build-lib={target}", f"--build-temp={target}/o"],
        cwd=ROOT,
        env={**os.environ, "UME_BUILD_CUDA": cuda},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (target / "ume_kernels").glob("_C.*")
    return module


# Loads the file by itself, without torch, and says whether that brought a CUDA driver along.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
version = module.cuda_runtime_version() if module.with_cuda else 0
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(module.__version__, module.with_cuda, version // 1000, "libcuda" in maps, *module.cpu_isas())
if module.with_cuda:
    info = module.cuda_info()
    assert (info["device_count"] == 0) == bool(info["error"]), info
"""


def load(module: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(module)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_builds_cpp_only(tmp_path: Path) -> None:
    version, cuda, _, driver, *isas = load(compile_module(tmp_path, "0"))
    assert version == ume_kernels.version.__version__
    assert (cuda, driver) == ("False", "False")
    assert isas[0] == "scalar"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_builds_cuda_and_imports_without_a_driver(tmp_path: Path) -> None:
    version, cuda, major, driver, *_ = load(compile_module(tmp_path, "1"))
    assert version == ume_kernels.version.__version__
    assert (cuda, driver) == ("True", "False")
    assert int(major) >= 11


def test_compiler_errors_are_reported(tmp_path: Path) -> None:
    program(tmp_path, "broken-c++")
    done = subprocess.run(
        [*BUILD, f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/o"],
        cwd=ROOT,
        env={**os.environ, "UME_BUILD_CUDA": "0", "CXX": str(tmp_path / "broken-c++")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "the native module failed to compile" in done.stderr
