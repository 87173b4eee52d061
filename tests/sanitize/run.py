"""Run the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize/run.py                     the tests named in TESTS
    python tests/sanitize/run.py -- -x tests/kernels/test_linear.py

The C++ sources are compiled once more, with the sanitizers, into a temporary copy of ume_kernels
that goes in front of the installed one. Any error ends the run with the sanitizer's report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZERS = "address,undefined"
TESTS = (
    "tests/kernels/test_linear.py",
    "tests/kernels/test_tile_engine.py",
    "tests/kernels/test_similarity_topk_native.py",
    "tests/kernels/test_contrastive_loss_native.py",
)


def build(into: Path) -> None:
    """The package with a sanitized native module in `into`."""
    shutil.copytree(
        ROOT / "ume_kernels", into / "ume_kernels", ignore=shutil.ignore_patterns("_C*", "__pyc*")
    )
    environment = dict(os.environ, UME_SANITIZE=SANITIZERS, UME_BUILD_CUDA="0")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(into), "--build-temp", str(into / "objects")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def runtime(library: str) -> str:
    """Path of a sanitizer's runtime, which must be loaded before anything else."""
    compiler = os.environ.get("CXX", "c++").split()
    found = subprocess.run(
        [*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"the compiler has no {library}: install its sanitizer runtime")
    return str(Path(found).resolve())


def main() -> int:
    """Build, run pytest, return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arguments", nargs="*", help="for pytest, instead of the usual tests")
    arguments = parser.parse_args().arguments or list(TESTS)
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        environment = dict(
            os.environ,
            LD_PRELOAD=runtime("libasan.so") + ":" + runtime("libstdc++.so"),
            # Python and its extensions keep memory until the process ends; ASan calls that leaks.
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",
            UBSAN_OPTIONS="print_stacktrace=1",
            PYTHONPATH=scratch,
            PYTHONSAFEPATH="1",  # else this folder's ume_kernels comes before it (CPython 3.11)
        )
        where = subprocess.run(
            [sys.executable, "-c", "import ume_kernels._C as c; print(c.__file__)"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if not where.startswith(scratch):
            raise SystemExit(f"the sanitized module was not imported, but {where}")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
