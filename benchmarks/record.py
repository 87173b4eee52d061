"""One benchmark: run, and what ``ume bench report`` needs of it noted in ``extra_info``.

Every figure says its section (one table each), its group (what is compared with one another), its
engine, and whether that is this package (``ours``), the ``reference`` path or another ``rival``.
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

Role = Literal["ours", "reference", "rival"]
ENERGY_SECONDS = 1.0
"""The energy counter moves in steps of some ten milliseconds."""


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
    filled: bool = True,
    graph: bool = False,
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
        filled: short calls are repeated until a round is long enough.
        graph: on CUDA, record the calls of a round as one CUDA graph.
        info: more to note: ``batch``, ``latent_steps``, ``floor_seconds``, ``bar``, ….

    Returns:
        What the last call returned.
    """
    size = scale()
    every = [work] if callable(work) else list(work)
    result: Any = None
    seconds = math.inf
    least = max(warm_up, len(every)) if warm_up else 0
    for number, call in enumerate(itertools.islice(itertools.cycle(every), 3 * least)):
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
    benchmark.pedantic(complete, rounds=1 if size.tiny else rounds or size.rounds, iterations=1)
    benchmark.extra_info.update(
        describe(), section=section, engine=engine, role=role, samples=samples, calls=calls,
        size=size.name, tiny=size.tiny, **energy(body, samples * calls),
        **{key: value for key, value in info.items() if value is not None},
    )  # fmt: skip
    return result


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
