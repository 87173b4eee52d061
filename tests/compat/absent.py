"""A Python environment in which transformers, and all that ume_kernels does not need, is absent.

A folder of links into the current environment: torch, numpy, Triton, what these need, and what the
tests need. Python started with ``-S`` and that folder on PYTHONPATH sees nothing else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

NEEDED = ("torch", "numpy", "triton", "pytest", "pytest-xdist", "hypothesis", "safetensors")
"""The last four are the tests' own; safetensors holds the recorded cases."""

ABSENT = ("transformers", "tokenizers", "PIL", "rich", "typer", "faiss", "sklearn")

TESTS = ("tests/test_without_transformers.py", "tests/kernels/test_dispatch.py")
"""Every operation once; its numbers do not depend on what is installed."""

SELECTED = "not interpreted and not compat"
"""Tests marked compat compare with transformers."""


def closure(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The installed distributions among `names`, and those they require here, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform, or of an extra
        for line in found[name].requires or ():
            if "extra ==" not in line:
                waiting.append(re.match(r"[\w.-]+", line)[0])  # type: ignore[index]
    return found


def link(target: Path) -> None:
    """Fill `target` with links to the top-level files and folders of what is needed."""
    target.mkdir(parents=True, exist_ok=True)
    for distribution in closure(NEEDED).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top in ("..", "__pycache__") or top.endswith(".pth") or (target / top).exists():
                continue
            (target / top).symlink_to(distribution.locate_file(top))


def run_tests(target: Path, report: Path, arguments: list[str], root: Path) -> int:
    """pytest's exit status for the kernels' tests; their results go to `report`."""
    link(target)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    python = [sys.executable, "-S"]
    look = (
        f"import importlib.util as u; print(*(n for n in {ABSENT!r} if u.find_spec(n) is not None))"
    )
    seen = subprocess.run(
        [*python, "-c", look], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    if seen:
        raise SystemExit(f"{', '.join(seen)} can be imported although nothing should provide it")
    print("\nwithout transformers", flush=True)
    selected = arguments or list(TESTS)
    # Workers of pytest-xdist would be started without -S.
    command = [*python, "-m", "pytest", "-n0", "-m", SELECTED, f"--junitxml={report}", *selected]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode
