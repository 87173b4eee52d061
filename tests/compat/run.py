"""Run the tests marked ``compat`` under the other supported transformers versions, and without any.

    python tests/compat/run.py                          every version, tests marked compat
    python tests/compat/run.py --version 4.52.3 -- -x tests/backbone
    python tests/compat/run.py --version none           the kernels, where there is no transformers

Each version is a file transformers-VERSION.txt beside this one. It is installed without
dependencies into a folder of its own, which goes in front of the current environment on PYTHONPATH:
torch and everything else stay as they are. ``none`` is an environment in which neither transformers
nor anything else is installed that ume_kernels does not need (see absent.py). The last line sums up
all runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import absent

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NONE = "none"
VERSIONS = [
    *sorted(p.stem.removeprefix("transformers-") for p in HERE.glob("transformers-*.txt")),
    NONE,
]
# Kernels in the interpreter are slow, and the same whatever transformers is.
SELECTED = "compat and not interpreted"
NO_TESTS = 5  # pytest's exit status


def install(version: str, target: Path) -> None:
    """Put one transformers version and what it alone needs into `target`, once."""
    done = target / ".installed"
    if done.exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run(
        [*pip, "--target", str(target), "-r", str(HERE / f"transformers-{version}.txt")],
        check=True,
    )
    done.touch()


def run_tests(version: str, target: Path, report: Path, arguments: list[str]) -> int:
    """pytest's exit status for one version; its results go to `report`."""
    environment = dict(os.environ)
    paths = [str(target), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    found = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if found != version:
        raise SystemExit(f"asked for transformers {version}, got {found}; clear {target}")
    print(f"\ntransformers {version}", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", SELECTED, f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def count(report: Path) -> Counter[str]:
    """How many tests of a junit report passed, failed and were skipped."""
    total: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        total["failed"] += failed
        total["skipped"] += skipped
        total["passed"] += int(suite.get("tests", 0)) - failed - skipped
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="append", choices=VERSIONS, help="default: all")
    parser.add_argument("--into", type=Path, help="keep the installed versions here for next time")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()

    total: Counter[str] = Counter()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        home = options.into or Path(scratch)
        for version in options.version or VERSIONS:
            target = home / f"transformers-{version}"
            report = Path(scratch) / f"{version}.xml"
            if version == NONE:
                status = absent.run_tests(target, report, options.pytest, ROOT)
            else:
                install(version, target)
                status = run_tests(version, target, report, options.pytest)
            if status == NO_TESTS:
                print("no test is marked compat: nothing was checked")
            failed |= status != 0
            if report.exists():
                total += count(report)
    failed |= total["failed"] > 0
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
