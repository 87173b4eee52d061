"""Counters with which the programs of a tile agree on who finishes it.

Launches that use the same counters must follow each other. By default they belong to a stream; who
replays graphs from several streams owns the counters of its graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_MINIMUM = 4096


class ArrivalCounters:
    """Int32 zeros that kernels return to zero, so that they are cleared only once."""

    def __init__(self) -> None:
        # Replaced buffers are kept: a captured launch may still point at them.
        self._buffers: list[torch.Tensor] = []

    def take(self, device: torch.device, count: int) -> torch.Tensor:
        """At least ``count`` of them.

        A graph capture that needs more than there are gets zeros of its own, which the graph
        clears at each replay; a run of the same work before the capture avoids that.
        """
        for held in reversed(self._buffers):
            if held.device == device and held.numel() >= count:
                return held
        fresh = torch.zeros(max(count, _MINIMUM), dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._buffers.append(fresh)
        return fresh


_owner: ContextVar[ArrivalCounters | None] = ContextVar("arrival_counters", default=None)
_of_stream: dict[tuple[torch.device, int], ArrivalCounters] = {}


@contextmanager
def own_counters(counters: ArrivalCounters) -> Iterator[None]:
    """Launches inside use ``counters``, whatever stream they are on."""
    token = _owner.set(counters)
    try:
        yield
    finally:
        _owner.reset(token)


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros for one launch."""
    counters = _owner.get()
    if counters is None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        counters = _of_stream.setdefault((device, stream), ArrivalCounters())
    return counters.take(device, count)
