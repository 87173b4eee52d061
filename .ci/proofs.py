"""Which of the expensive proofs still hold: what each depended on when it passed last.

    python .ci/proofs.py due [--all]   names of those to run, and on stderr why
    python .ci/proofs.py command NAME  Python's arguments that run one
    python .ci/proofs.py passed NAME   note in proofs.json that it holds for what is here now
    python .ci/proofs.py ignore        pytest's arguments that leave them all out

A proof is relied on only where the content of its tests and sources and the versions of its tools
are those of the note; what was noted is what ``.ci/run --all`` has seen. Needs the environment in
which the tests run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / ".ci" / "proofs.json"
PYTHON = ("python", "torch", "numpy", "hypothesis", "pytest")


@dataclass(frozen=True)
class Proof:
    """Test files, what they depend on besides (patterns of ``git ls-files``), and tools.

    Tests that a script runs in its own way are among the others, too.
    """

    tests: tuple[str, ...]
    sources: tuple[str, ...]
    tools: tuple[str, ...]
    script: str | None = None


PROOFS: Mapping[str, Proof] = {
    "interpreter": Proof(
        ("tests/kernels/test_*_triton.py", "tests/kernels/test_prefill_ops.py"),
        ("ume_kernels", "tests/conftest.py", "tests/conformance/plume_tiny/ops.*"),
        (*PYTHON, "triton"),
    ),
    "interpreted-rollout": Proof(
        ("tests/embedders/test_conformance_triton.py",),
        (
            "ume_kernels",
            "ume_models/rollout",
            "ume_models/backbone",
            "ume_models/embedders/base.py",
            "ume_models/embedders/plume.py",
            "tests/conftest.py",
            "tests/conformance/plume_tiny",
        ),
        (*PYTHON, "triton", "transformers"),
    ),
    "ahead-of-time": Proof(
        ("tests/kernels/test_aot.py",),
        ("ume_kernels", "tests/kernels/toy_kernels", "tests/conftest.py"),
        (*PYTHON, "triton"),
    ),
    "emulator": Proof(
        ("tests/kernels/test_cuda_emulated*.py",),
        ("csrc", "tests/emulator", "tests/conftest.py"),
        (*PYTHON, "g++"),
    ),
    "builds": Proof(
        ("tests/test_build.py", "tests/kernels/test_cuda_binary.py"),
        ("csrc", "setup.py", "ume_kernels/version.py", "benchmarks/cuda_binaries.py"),
        (*PYTHON, "setuptools", "pybind11", "ninja", "c++", "nvcc"),
    ),
    "sanitizers": Proof(
        tuple(f"tests/kernels/test_{name}.py" for name in ("linear", "tile_engine", "*_native")),
        ("csrc", "setup.py", "ume_kernels", "tests/conftest.py", "tests/sanitize"),
        (*PYTHON, "pybind11", "c++", "instruction sets"),
        script="tests/sanitize/run.py",
    ),
}


def files(patterns: tuple[str, ...]) -> list[str]:
    """The tracked files that match, as far as they lie here; each pattern must match one."""
    command = ["git", "ls-files", "-z", "--error-unmatch", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in found.split("\0") if (ROOT / name).is_file())


def digest(patterns: tuple[str, ...]) -> str:
    """Of the names and contents of the files."""
    total = hashlib.sha256()
    for name in files(patterns):
        content = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()[:32]


def version(tool: str) -> str:
    """Of a program, a package or this machine; ``absent`` where there is none."""
    if tool == "python":
        return ".".join(platform.python_version_tuple()[:2]) + " " + platform.machine()
    if tool == "instruction sets":
        from ume_kernels import native

        return " ".join(native.require().cpu_isas())
    try:
        if tool not in ("c++", "g++", "nvcc"):
            return metadata.version(tool)
        command = shlex.split(os.environ.get("CXX", tool)) if tool == "c++" else [tool]
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        return next(line for line in told.stdout.splitlines() if re.search(r"\d\.\d", line))
    except (metadata.PackageNotFoundError, FileNotFoundError):
        return "absent"


def state(proof: Proof) -> dict[str, str]:
    """All that the proof depends on, as it is now."""
    tools = {tool: version(tool) for tool in proof.tools}
    return {"tests": digest(proof.tests), "sources": digest(proof.sources), **tools}


def why(noted: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """Why a proof must run again; None if it need not."""
    if noted is None:
        return "never noted"
    changed = [name for name in {**noted, **now} if noted.get(name) != now.get(name)]
    return f"changed: {', '.join(changed)}" if changed else None


def due(notes: Mapping[str, Mapping[str, str]], everything: bool) -> None:
    """Print the names of those to run, and why to stderr."""
    for name, proof in PROOFS.items():
        now = state(proof)
        reason = "all was asked for" if everything else why(notes.get(name), now)
        if reason:
            print(name)
        whole = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:12]
        told = f"run: {reason}" if reason else f"relied on the proof of {whole}"
        print(f"{name}: {told}", file=sys.stderr)


def main() -> None:
    """See above."""
    command, *rest = sys.argv[1:]
    notes = json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.exists() else {}
    if command == "due":
        due(notes, "--all" in rest)
    elif command == "ignore":
        ours = (proof for proof in PROOFS.values() if not proof.script)
        print(*(f"--ignore={file}" for proof in ours for file in files(proof.tests)))
    elif command == "command":
        proof = PROOFS[rest[0]]
        print(proof.script or " ".join(["-m", "pytest", *files(proof.tests)]))
    elif command == "passed":
        notes[rest[0]] = state(PROOFS[rest[0]])
        NOTES.write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        raise SystemExit(f"unknown command {command!r}")


if __name__ == "__main__":
    main()
