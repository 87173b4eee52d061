"""One benchmark: run, and what ``ume bench report`` needs of it noted in ``extra_info``.

Every figure says its section (one table each), its group (what is compared with one another), its
engine, and whether that is this package (``ours``), the ``reference`` path, another ``rival``, or
this package without one of its parts (``ablation``), which is no rival. All engines of a group get
the same rounds and the same warm-up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from benchmarks.gpu.timing import in_one_graph, synchronize
from benchmarks.machine import describe, energy_meter, gpu_state
from benchmarks.scale import scale

Role = Literal["ours", "reference", "rival", "ablation"]
ENERGY_SECONDS = 1.0
"""The energy counter moves in steps of some ten milliseconds."""

_PLANNED: dict[tuple[str, str], tuple[int, int]] = {}
"""Rounds and warm-up that the first engine of a section's group got."""


def record(
    benchmark: Any,
    work: Callable[[], Any] | Sequence[Callable[[], Any]],
    *,
    section: str,
    group: str,
    engine: str,
    role: Role,
    samples: int = 1,
    rounds: int | None = None,
    warm_up: int = 1,
    warm: Callable[[], Any] | None = None,
    filled: bool = True,
    graph: bool = False,
    on_cpu: bool = False,
    **info: Any,
) -> Any:
    """Measure ``work`` and note what it was.

    Args:
        benchmark: the fixture.
        work: what is called; several are called in turn, such as one operation on other weights,
            so that none stays in a cache.
        section, group, engine, role: see above.
        samples: inputs per call.
        rounds: default that of the scale.
        warm_up: calls before, at least; more where calls are short.
        warm: called for the warm-up in place of ``work``, such as the same on other inputs.
        filled: short calls are repeated until a round is long enough.
        graph: on CUDA, record the calls of a round as one CUDA graph.
        on_cpu: it does not use the GPU of a machine that has one: its name says so, and the GPU's
            energy and state are not noted.
        info: more to note: ``batch``, ``latent_steps``, ``floor_seconds``, ``bar``, ….

    Returns:
        What the last call returned.

    Raises:
        ValueError: another engine of the group got other rounds or another warm-up.
    """
    size = scale()
    rounds = rounds or size.rounds
    _same_for_all(section, group, engine, (rounds, warm_up))
    rounds = 1 if size.tiny else rounds
    beside_gpu = on_cpu and size.device.type == "cuda"
    every = [work] if callable(work) else list(work)
    result: Any = None
    seconds = math.inf
    warming = every if warm is None else [warm]
    least = max(warm_up, len(warming)) if warm_up else 0
    for number, call in enumerate(itertools.islice(itertools.cycle(warming), 3 * least)):
        began = time.perf_counter()
        result = call()
        synchronize(size.device)
        seconds = min(seconds, time.perf_counter() - began)
        if number + 1 >= warm_up and seconds > size.least:
            break  # slow enough that the first calls do not matter
    calls = len(every)
    if filled and warm_up and seconds < size.least:
        calls *= math.ceil(size.least / (calls * max(seconds, 1e-7)))
    planned = list(itertools.islice(itertools.cycle(every), calls))
    if graph and size.device.type == "cuda":
        body: Callable[[], Any] = in_one_graph(planned, size.device)
    else:

        def body() -> Any:
            for call in planned[:-1]:
                call()
            return planned[-1]()

    def complete() -> Any:
        nonlocal result
        result = body()
        synchronize(size.device)
        return result

    benchmark.group = group
    benchmark.pedantic(complete, rounds=rounds, iterations=1)
    benchmark.extra_info.update(
        describe(), section=section, engine=engine + " (CPU)" * beside_gpu, role=role,
        samples=samples, calls=calls, rounds=rounds, warm_up=warm_up, size=size.name,
        tiny=size.tiny, **({} if on_cpu else energy(body, samples * calls)),
        **{key: value for key, value in info.items() if value is not None},
    )  # fmt: skip
    return result


def _same_for_all(section: str, group: str, engine: str, planned: tuple[int, int]) -> None:
    """The best of more rounds is faster by chance, and what ran before is warm."""
    others = _PLANNED.setdefault((section, group), planned)
    if planned != others:
        raise ValueError(
            f"{group}: {engine} gets {planned[0]} rounds after {planned[1]} calls, the engines "
            f"before it {others[0]} after {others[1]}"
        )


def energy(body: Callable[[], Any], samples: int) -> dict[str, Any]:
    """Joules per sample, clocks, power, temperature and memory under this load; {} without NVML.

    A pass of its own after the timing: asking takes about a millisecond.
    """
    meter = energy_meter()
    if meter is None:
        return {}
    device = scale().device
    synchronize(device)
    before, began, count = meter(), time.perf_counter(), 0
    state = None
    while not count or time.perf_counter() - began < ENERGY_SECONDS:
        body()
        count += 1
        state = gpu_state()  # while the device still works on it
        synchronize(device)
    found: dict[str, Any] = {"nvml": state}
    after = meter()
    if before is not None and after is not None:
        found["energy_joules"] = (after - before) / (count * samples)
    return found
