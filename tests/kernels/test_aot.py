"""ume_kernels.aot: every shipped kernel compiles inside its budget; bad ones are found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ume_kernels
from ume_kernels.aot import ROOMS, Budget, Occupancy, judge, occupancy
from ume_kernels.aot.build import compile_variant

PACKAGE = Path(ume_kernels.__file__).parent
HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(PACKAGE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The interpreter is what the other tests use; the command must leave it by itself.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=3600
    )


def compile_rooms(file: Path, *rooms: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    done = run("-m", "ume_kernels.aot", "--room", *rooms, "--json", str(file))
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, dict[str, Any]]:
    file = tmp_path_factory.mktemp("aot") / "toy.json"
    done, results = compile_rooms(file, "toy_kernels.variants", "toy_kernels.absent")
    return done.stdout, done.returncode, results


def of(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in results["variants"] if row["name"] == name]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, dict[str, Any]]:
    """All rooms at once: starting the compiler's processes costs seconds."""
    done, results = compile_rooms(tmp_path_factory.mktemp("aot") / "all.json", *ROOMS)
    return done.stdout + done.stderr, done.returncode, results


@needs_triton
@pytest.mark.parametrize("room", ROOMS)
def test_shipped_kernels_keep_to_their_budgets(
    room: str, shipped: tuple[str, int, dict[str, Any]]
) -> None:
    variants = [row for row in shipped[2]["variants"] if row["room"] == room]
    assert {row["arch"] for row in variants} == {80, 90}
    bad = {(row["name"], row["arch"]): row["failures"] for row in variants}
    assert not {which: failures for which, failures in bad.items() if failures}
    assert all(row["local"] == 0 for row in variants)


@needs_triton
def test_every_shipped_kernel_is_compiled(shipped: tuple[str, int, dict[str, Any]]) -> None:
    told, status, results = shipped
    assert not results["uncovered"]
    assert status == 0, told


def test_every_room_with_kernels_is_listed() -> None:
    with_kernels = {path.parent.name for path in PACKAGE.glob("*/triton_*.py")}
    assert with_kernels == set(ROOMS)
    assert {path.parent.parent.name for path in PACKAGE.glob("*/tuning/*.json")} <= set(ROOMS)


@needs_triton
def test_good_kernels_pass(toy: tuple[str, int, dict[str, Any]]) -> None:
    results = toy[2]
    for name in ("good", "product"):
        assert [(row["arch"], row["failures"]) for row in of(results, name)] == [(80, []), (90, [])]
    for row in of(results, "product"):
        # A pipelined matrix product: asynchronous copies, tensor cores, two tiles of three in use.
        assert row["instructions"]["async_copy"] > 0
        assert row["instructions"]["mma"] > 0
        assert row["instructions"]["local"] == 0
        assert row["shared"] >= 2 * (64 * 64 + 64 * 64) * 2
        assert row["occupancy"]["warps"] == 4 * row["occupancy"]["blocks"] > 0


@needs_triton
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too many registers", r"registers, budget 8"),
        ("too much shared memory", r"bytes of shared memory, budget 1024"),
        ("too few blocks", r"blocks per multiprocessor \(.+\), budget 32"),
        ("spilling", r"spills: \d+ bytes of local memory"),
        ("broken", r"does not compile: CompilationError: .*cannot add pointers"),
    ],
)
def test_bad_kernels_are_reported(
    toy: tuple[str, int, dict[str, Any]], name: str, words: str
) -> None:
    printed, status, results = toy
    assert status == 1
    assert not results["passed"]
    for row in of(results, name):
        assert len(row["failures"]) == 1
        assert re.search(words, row["failures"][0])
    assert len(of(results, name)) == 2
    if name == "spilling":
        assert all(row["instructions"]["local"] > 0 for row in of(results, name))
    assert name in printed


@needs_triton
def test_what_is_in_no_list_is_reported(toy: tuple[str, int, dict[str, Any]]) -> None:
    printed, _, results = toy
    missing = [
        "toy_kernels.variants: kernel triton_kernels._forgotten_kernel",
        "toy_kernels.absent: there is no module toy_kernels.absent",
    ]
    assert results["uncovered"] == missing
    assert all(f"not compiled: {what}" in printed for what in missing)


@needs_triton
def test_results_name_versions(toy: tuple[str, int, dict[str, Any]]) -> None:
    from importlib.metadata import version

    results = toy[2]
    assert results["triton"] == version("triton")
    assert results["architectures"] == ["sm_80", "sm_90"]
    assert results["date"].startswith("20")


@needs_triton
def test_a_shipped_configuration_without_variant_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ume_kernels import tuning
    from ume_kernels.aot import Variant, build

    variant = Variant("fc1 bf16", None, {}, {"BLOCK_N": 8}, 4, 1, (), Budget(1, 1, 1))
    entries = [
        ("default", "fc1", {"max_rows": 4, "BLOCK_N": 8, "num_warps": 4}),
        ("default", "fc1", {"max_rows": None, "BLOCK_N": 64, "num_warps": 4}),
        ("default", "fc1", {"max_rows": None, "BLOCK_N": 8, "num_warps": 8}),
        ("nvidia_h200", "fc2", {"max_rows": None, "BLOCK_N": 8, "num_warps": 4}),
        ("nvidia_h200", "fc1", {"max_rows": None, "gemm": "cublas"}),
    ]
    monkeypatch.setattr(tuning, "shipped", lambda room: iter(entries))
    missing = list(build._unshipped("moe_transition", [variant]))
    assert [what.split(": ")[0] for what in missing] == [
        "tuning/default.json, 'fc1'",
        "tuning/default.json, 'fc1'",
        "tuning/nvidia_h200.json, 'fc2'",
    ]
    assert "64" in missing[0] and "'num_warps': 8" in missing[1]


def test_unknown_room_is_refused() -> None:
    done = run("-m", "ume_kernels.aot", "--room", "kitchen")
    assert done.returncode == 2
    assert "unknown room 'kitchen'; there are moe_transition, decode, prefill" in done.stderr


def test_interpreted_kernels_are_refused() -> None:
    pytest.importorskip("triton")
    from ume_kernels.aot import Variant

    variant = Variant("plain", len, {}, {}, 4, 1, (), Budget(1, 1, 1))
    with pytest.raises(RuntimeError, match="plain: its kernel is a builtin_function_or_method"):
        compile_variant(variant, 80)


# By hand, after NVIDIA's occupancy calculator.
#  32 registers: 1,024 per warp, 16 warps per quarter, 64 in all.
#  33 → 1,280 per warp (steps of 256), 12 per quarter, 48 in all.
#  168 → 5,376 per warp, 3 per quarter, 12 in all: three blocks of 4 warps.
#  255 → 8,192 per warp, 2 per quarter, 8 in all: one block of 8 warps, none of 16.
#  Shared memory: 164 KiB hold three blocks of 48 + 1 KiB on sm_80, 228 KiB four on sm_90.
@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "expected"),
    [
        (80, 4, 32, 0, Occupancy(16, 64, "registers")),
        (80, 4, 24, 0, Occupancy(16, 64, "threads")),
        (80, 4, 33, 0, Occupancy(12, 48, "registers")),
        (90, 4, 168, 0, Occupancy(3, 12, "registers")),
        (90, 8, 255, 0, Occupancy(1, 8, "registers")),
        (90, 16, 255, 0, Occupancy(0, 0, "registers")),
        (80, 1, 16, 0, Occupancy(32, 32, "blocks")),
        (80, 4, 32, 48 << 10, Occupancy(3, 12, "shared memory")),
        (90, 4, 32, 48 << 10, Occupancy(4, 16, "shared memory")),
        # one byte more takes a step of 128
        (80, 4, 32, (40 << 10), Occupancy(4, 16, "shared memory")),
        (80, 4, 32, (40 << 10) + 1, Occupancy(3, 12, "shared memory")),
        (80, 4, 32, 163 << 10, Occupancy(1, 4, "shared memory")),
        (80, 4, 32, (163 << 10) + 1, Occupancy(0, 0, "shared memory")),
        (90, 4, 32, 227 << 10, Occupancy(1, 4, "shared memory")),
        (90, 4, 32, (227 << 10) + 1, Occupancy(0, 0, "shared memory")),
    ],
)
def test_occupancy(
    arch: int, num_warps: int, registers: int, shared: int, expected: Occupancy
) -> None:
    assert occupancy(arch, num_warps, registers, shared) == expected


def test_the_budget_itself_is_allowed() -> None:
    budget = Budget(registers=128, shared=1024, blocks_per_sm=2)
    exact = Occupancy(2, 8, "registers")
    assert judge(budget, 128, 1024, 0, exact) == ()
    assert len(judge(budget, 129, 1025, 8, Occupancy(1, 4, "registers"))) == 4


def test_importing_touches_neither_triton_nor_the_driver() -> None:
    script = """
import sys, torch
torch.cuda._lazy_init = lambda: sys.exit("CUDA was initialised")
import ume_kernels, ume_kernels.aot, ume_kernels.aot.build, ume_kernels.triton_backend
import ume_kernels.tuning
assert "triton" not in sys.modules, "importing ume_kernels imports Triton"
assert not torch.cuda.is_initialized()
ume_kernels.explain()
assert "triton" not in sys.modules
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
