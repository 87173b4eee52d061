"""Time of work on a device, with the device's state while it ran.

On CUDA every round is timed with events and the median is taken; inputs that would stay in the L2
cache are rotated by the caller, and launches too short to time one by one are captured into one
CUDA graph. On a CPU the same calls run, so that a dry run takes every path it can.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.machine import gpu_state

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call over ``rounds`` rounds, and NVML's readings before the last one ended."""

    median: float
    p20: float
    p80: float
    rounds: int
    nvml: dict[str, float] | None

    def per(self, calls: int) -> Timing:
        """The same for one of ``calls`` equal calls in a round."""
        return Timing(
            self.median / calls, self.p20 / calls, self.p80 / calls, self.rounds, self.nvml
        )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    work: Work,
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 200),
    warm_up: int = 3,
    before: Work | None = None,
) -> Timing:
    """Median time of ``work``.

    Args:
        work: what is timed; called with nothing.
        device: where it runs.
        seconds: rounds are added for so long,
        rounds: but at least and at most so many.
        warm_up: calls before the first round.
        before: called before each round, not timed.
    """
    for _ in range(warm_up):
        if before is not None:
            before()
        work()
    synchronize(device)
    times: list[float] = []
    nvml = None
    until = time.perf_counter() + seconds
    while len(times) < rounds[0] or (len(times) < rounds[1] and time.perf_counter() < until):
        if before is not None:
            before()
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            if len(times) % 16 == 4:  # seldom: a query takes about a millisecond
                nvml = gpu_state() or nvml
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    times.sort()
    fifth = len(times) // 5
    return Timing(
        statistics.median(times), times[fifth], times[-1 - fifth], len(times), nvml or gpu_state()
    )


def wall(work: Work, device: torch.device, rounds: int, warm_up: int = 1) -> Timing:
    """Median wall-clock time of ``work``, for what also runs on the host."""

    def complete() -> None:
        work()
        synchronize(device)

    for _ in range(warm_up):
        complete()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        complete()
        times.append(time.perf_counter() - began)
    times.sort()
    fifth = len(times) // 5
    return Timing(
        statistics.median(times), times[fifth], times[-1 - fifth], len(times), gpu_state()
    )


def in_one_graph(calls: Sequence[Work], device: torch.device) -> Work:
    """Replay of a CUDA graph of all ``calls`` in order; on a CPU, a loop over them."""

    def every() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return every
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        every()  # compiles, and allocates what is kept per stream, outside of the capture
        every()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        every()
    torch.cuda.current_stream(device).wait_stream(side)
    return graph.replay
