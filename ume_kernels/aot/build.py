"""Compiles variants in processes of their own, where Triton is not in interpreter mode."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ume_kernels import tuning
from ume_kernels.aot.binary import inspect
from ume_kernels.aot.occupancy import WARP, occupancy
from ume_kernels.aot.variant import Compiled, Variant, judge


@dataclass(frozen=True)
class Report:
    """Everything that was compiled, and what should have been and is in no list of variants."""

    triton: str
    compiled: tuple[Compiled, ...]
    uncovered: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Nothing is outside its budget, and nothing is missing."""
        return not self.uncovered and not any(row.failures for row in self.compiled)


def module_of(room: str) -> str:
    """Module with the variants of a room; a dotted name is such a module itself."""
    return room if "." in room else f"ume_kernels.{room}.variants"


def compile_all(rooms: Sequence[str], archs: Sequence[int], jobs: int | None = None) -> Report:
    """Compile every variant of ``rooms`` for ``archs`` in ``jobs`` processes (one per core).

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: two variants of a room share a name.
    """
    context = multiprocessing.get_context("spawn")
    with _no_interpreter(), ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        tasks: list[tuple[str, int, int]] = []
        uncovered: list[str] = []
        triton = ""
        for room, (count, missing, version) in zip(rooms, pool.map(_survey, rooms), strict=True):
            tasks += [(room, index, arch) for index in range(count) for arch in archs]
            uncovered += missing
            triton = version
        return Report(triton, tuple(pool.map(_compile_task, tasks)), tuple(uncovered))


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """``TRITON_INTERPRET`` off for the processes started meanwhile.

    Triton decides when it is imported, and an import may be the first thing a process does.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _variants(room: str) -> list[Variant]:
    return list(importlib.import_module(module_of(room)).variants())


def _survey(room: str) -> tuple[int, list[str], str]:
    """Number of variants of a room, what they leave out, and Triton's version."""
    import triton

    try:
        variants = _variants(room)
    except ModuleNotFoundError as error:
        if error.name != module_of(room):
            raise
        return 0, [f"{room}: there is no module {error.name}"], triton.__version__
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{module_of(room)}: several variants are called {', '.join(twice)}")
    missing = [f"{room}: {what}" for what in _uncovered(room, variants)]
    return len(variants), missing, triton.__version__


def _uncovered(room: str, variants: Sequence[Variant]) -> Iterator[str]:
    """Kernels and shipped configurations that no variant compiles."""
    if not variants:
        yield "no variants"
    listing = importlib.import_module(module_of(room))
    folder = Path(str(listing.__file__)).parent
    covered = {id(variant.kernel) for variant in variants}
    for path in sorted(folder.glob("triton_*.py")):
        for name, kernel in _kernels(importlib.import_module(f"{listing.__package__}.{path.stem}")):
            if id(kernel) not in covered:
                yield f"kernel {path.stem}.{name}"
    if "." not in room:
        yield from _unshipped(room, variants)


def _unshipped(room: str, variants: Sequence[Variant]) -> Iterator[str]:
    """Entries of a room's tuning tables that no variant compiles."""
    for file, kernel, entry in tuning.shipped(room):
        if entry.get("gemm", "triton") != "triton":
            continue  # a library's product: nothing of ours to compile
        if not any(_matches(variant, kernel, entry) for variant in variants):
            yield f"tuning/{file}.json, {kernel!r}: {dict(entry)}"


def _kernels(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Launched kernels of a module: functions under ``@triton.jit`` called ``…_kernel``."""
    from triton import JITFunction

    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            yield name, value


def _matches(variant: Variant, kernel: str, entry: Mapping[str, Any]) -> bool:
    """Whether a variant is ``kernel`` with the compile-time values that a tuning entry names."""
    values = {
        **variant.constexprs,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
    }
    return variant.name.startswith(kernel) and all(
        values[key] == value for key, value in entry.items() if key in values
    )


def _compile_task(task: tuple[str, int, int]) -> Compiled:
    room, index, arch = task
    return compile_variant(_variants(room)[index], arch, room)


def compile_variant(variant: Variant, arch: int, room: str = "") -> Compiled:
    """Compile one variant and compare it with its budget; a failed compile is a failure, too.

    Raises:
        RuntimeError: Triton is in interpreter mode in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{variant.name}: its kernel is a {type(variant.kernel).__name__}; TRITON_INTERPRET "
            "was set when Triton was imported"
        )
    blank = Compiled(room, variant.name, arch, variant.num_warps, variant.budget)
    arguments = list(variant.kernel.arg_names)
    attributes = {(arguments.index(a),): [["tt.divisibility", 16]] for a in variant.divisible}
    try:
        # in the order of the kernel's arguments, whatever the order in the variant
        signature = {name: variant.signature[name] for name in arguments}
        source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
        with warnings.catch_warnings():
            # Triton 3.9 announces another default of floating-point fusion for later.
            warnings.simplefilter("ignore", UserWarning)
            kernel = triton.compile(
                source,
                target=GPUTarget("cuda", arch, WARP),
                options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
            )
    except Exception as error:  # whatever the compiler raises; the other variants go on
        reason = str(error).strip().splitlines() or [""]
        return replace(blank, failures=(f"does not compile: {type(error).__name__}: {reason[-1]}",))
    binary = inspect(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    fits = occupancy(arch, kernel.metadata.num_warps, binary.registers, shared)
    return replace(
        blank,
        registers=binary.registers,
        shared=shared,
        local=binary.local,
        instructions=binary.instructions,
        occupancy=fits,
        failures=judge(variant.budget, binary.registers, shared, binary.local, fits),
    )
