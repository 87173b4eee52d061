"""Builds the native module ``ume_kernels._C`` with pybind11 and ninja.

Metadata is in pyproject.toml. Every C++ source under csrc/cpu is compiled always; every CUDA source
under csrc/cuda when the environment variable ``UME_BUILD_CUDA`` says so:

    auto (default)  compile them if ``nvcc`` is on PATH
    1               compile them, fail if ``nvcc`` is not there
    0               leave them out

``UME_SANITIZE`` compiles the C++ sources under compiler sanitizers, for instance
``address,undefined``; tests/sanitize/run.py uses it.

``UME_CUDA_ARCHS`` chooses the architectures, for instance ``"80;90"`` (the default). Sources named
``*_sm90.cu`` use what only Hopper GPUs have: they are compiled for sm_90a alone, and left out when
90 is not among the architectures. No torch headers are used, so one build serves every torch
version and needs no GPU.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Python executes this line of site-packages when it starts. It does nothing unless the variable is
# set; then imports of known repositories are watched, which loads neither torch nor a model.
STARTUP_FILE = "ume_accelerate.pth"
STARTUP_LINE = (
    'import os; os.environ.get("UME_ACCELERATE") and __import__("ume_models.patching.auto")'
)


class BuildError(BaseError):
    """The native module cannot be built; the message names the remedy."""


def version() -> str:
    """The version that ume_kernels/version.py states, read without importing it."""
    tree = ast.parse((ROOT / "ume_kernels" / "version.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    raise BuildError("ume_kernels/version.py assigns no version")


def cxx_compiler() -> str:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError(
        "no C++ compiler found. Install one (Debian and Ubuntu: apt-get install g++, "
        "Fedora: dnf install gcc-c++, macOS: xcode-select --install) or name it in CXX."
    )


def nvcc_compiler() -> str | None:
    """Path of nvcc when the CUDA sources are to be built, else None."""
    wanted = os.environ.get("UME_BUILD_CUDA", "auto").strip().lower()
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"UME_BUILD_CUDA={wanted!r} is not one of 0, 1, auto")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise BuildError(
            "UME_BUILD_CUDA=1 but nvcc is not on PATH. Install the CUDA toolkit and put its bin "
            "directory on PATH, or build without CUDA sources: UME_BUILD_CUDA=0."
        )
    return nvcc


def ninja_program() -> str:
    """ninja from the Python package of that name, else from PATH."""
    try:
        import ninja

        program = Path(ninja.BIN_DIR) / ("ninja.exe" if os.name == "nt" else "ninja")
        if program.exists():
            return str(program)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found. Install it with: pip install ninja")
    return found


def openmp_flag(cxx: str) -> str:
    """-fopenmp where the compiler can compile and link it, else nothing: kernels run serially."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*cxx.split(), "-fopenmp", str(source), "-o", str(Path(scratch) / "probe")]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return "-fopenmp"
    print("warning: the compiler has no OpenMP; CPU kernels will run on one thread")
    return ""


def escape(path: Path | str) -> str:
    """A path as ninja spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cuda_archs() -> list[str]:
    """The architectures of $UME_CUDA_ARCHS, in its order: ``["80", "90"]`` unless it is set."""
    archs = [a.strip() for a in os.environ.get("UME_CUDA_ARCHS", "80;90").split(";") if a.strip()]
    for arch in archs:
        if not arch.rstrip("af").isdigit() or int(arch.rstrip("af")) < 80:
            raise BuildError(
                f"UME_CUDA_ARCHS has {arch!r}; it takes numbers from 80 on, separated by "
                "semicolons, for instance 80;90"
            )
    if not archs:
        raise BuildError("UME_CUDA_ARCHS names no architecture; the default is 80;90")
    return archs


def for_hopper(source: Path) -> bool:
    """Whether a CUDA source is for sm_90a only."""
    return source.stem.endswith("_sm90")


def gencode(source: Path, archs: list[str]) -> str:
    """nvcc's options for what `source` is compiled for."""
    if for_hopper(source):
        return "-gencode=arch=compute_90a,code=sm_90a"
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = archs[-1]  # its PTX, for GPUs newer than this build
    return " ".join([*options, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


def write_ninja(target: Path, objects: Path, nvcc: str | None) -> Path:
    """Write build.ninja for the module `target`, objects beside it; returns the file."""
    import pybind11

    cxx = cxx_compiler()
    openmp = openmp_flag(cxx)
    includes = [CSRC / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    include_flags = " ".join(f'-I"{path}"' for path in includes)
    sanitize = os.environ.get("UME_SANITIZE", "")
    level = "-O1" if sanitize else "-O3"  # instrumented code takes minutes to compile at -O3
    # -ffp-contract=off: whether a*b+c is fused must not depend on how a loop was inlined, or one
    # result could differ between batch sizes. GCC 12 warns falsely about _mm512_undefined_ps.
    cxxflags = (
        f"{level} -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off {openmp} "
        f'-Wall -Wextra -Wno-maybe-uninitialized -DUME_VERSION=\\"{version()}\\"'
    )
    if sanitize:
        cxxflags += f" -g -fno-omit-frame-pointer -fsanitize={sanitize} -fno-sanitize-recover=all"
    if nvcc:
        cxxflags += " -DUME_WITH_CUDA"
    archs = cuda_archs() if nvcc else []
    hopper = "90" in archs or "90a" in archs
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    sanitizers = f"-fsanitize={sanitize}" if sanitize else ""
    link = f"{cxx} -shared {openmp} {sanitizers} {undefined} $in -o $out"
    if nvcc:
        # nvcc links its runtime statically, so the module needs no CUDA library at import.
        host = f"-Xcompiler={openmp}" if openmp else ""
        link = f'"{nvcc}" -shared -cudart=static {host} $in -o $out'
    lines = [
        f"builddir = {escape(objects)}",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {cxxflags} {include_flags} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link}",
    ]
    if nvcc:
        lines += [
            "rule nvcc",
            f'  command = "{nvcc}" -MD -MF $out.d -O3 -std=c++17 $gencode '
            f"{'-DUME_WITH_SM90 ' if hopper else ''}"
            f'-Xcompiler=-fPIC,-fvisibility=hidden -I"{CSRC / "include"}" -c $in -o $out',
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    sources = [(p, "cxx") for p in [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]]
    if nvcc:
        cuda = sorted((CSRC / "cuda").glob("*.cu"))
        sources += [(p, "nvcc") for p in cuda if hopper or not for_hopper(p)]
    built = []
    for source, rule in sources:
        obj = objects / f"{source.parent.name}_{source.stem}.o"
        lines.append(f"build {escape(obj)}: {rule} {escape(source)}")
        if rule == "nvcc":
            lines.append(f"  gencode = {gencode(source, archs)}")
        built.append(escape(obj))
    lines.append(f"build {escape(target)}: link {' '.join(built)}")
    lines.append(f"default {escape(target)}")
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = objects / "build.ninja"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


class NinjaBuild(build_ext):
    """Compiles the one extension with ninja instead of one compiler process at a time."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext` to where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc = nvcc_compiler()
        print(f"building {target.name}: C++" + (f" and CUDA ({nvcc})" if nvcc else " only"))
        file = write_ninja(target, Path(self.build_temp).resolve() / "ume_kernels_C", nvcc)
        command = [ninja_program(), "-f", str(file)]
        if self.verbose:
            command.append("-v")
        result = subprocess.run(command, check=False)
        if result.returncode != 0:
            raise BuildError(
                "the native module failed to compile; the compiler's message is above"
                + (". UME_BUILD_CUDA=0 leaves the CUDA sources out" if nvcc else "")
            )


class CleanBuildPy(build_py):
    """Starts from an empty build/lib, so that modules deleted since do not end up in the wheel."""

    def run(self) -> None:
        """Clear build/lib, copy the packages, and put the start-up line beside them."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        # An editable wheel holds no packages; what it installs lies where install_lib says.
        install = self.get_finalized_command("install")
        folder = Path(install.install_lib if self.editable_mode else self.build_lib)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STARTUP_FILE).write_text(STARTUP_LINE + "\n", encoding="utf-8")


if __name__ == "__main__":
    (ROOT / "build").mkdir(exist_ok=True)
    setup(
        ext_modules=[Extension("ume_kernels._C", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "build_py": CleanBuildPy},
        options={"egg_info": {"egg_base": "build"}},
    )
