"""Streaming corpora: what is read, copied and scored in which order, without a GPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ume_kernels.similarity_topk import stream
from ume_kernels.similarity_topk.stream import (
    Rows,
    block_rows,
    copied,
    in_memory,
    read_ahead,
    spans,
)


class Point:
    """An event of ``Device``."""

    def __init__(self, device: Device, queue: str) -> None:
        self.device, self.queue, self.done = device, queue, False

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.reach(self)


class Device:
    """Two queues: ``eager`` runs as early as it may, or none; the others as late as they may.

    A buffer that is filled or read too early or too late shows as a wrong result.
    """

    def __init__(self, eager: str | None = None) -> None:
        self.queues: dict[str, deque[Any]] = {"compute": deque(), "copy": deque()}
        self.eager = eager
        self.lock = threading.RLock()
        self.closed = False

    def reach(self, point: Point) -> None:
        """Work off the queue of an event up to it, and what that waits for."""
        while not point.done:
            self._step(point.queue)

    def _step(self, name: str) -> None:
        item = self.queues[name].popleft()
        if isinstance(item, tuple):
            self.reach(item[0])
        elif isinstance(item, Point):
            item.done = True
        else:
            item()

    def add(self, name: str, *items: Any) -> None:
        with self.lock:
            self.queues[name].extend(items)
            while self.eager and (queue := self.queues[self.eager]):
                if isinstance(queue[0], tuple) and not queue[0][0].done:
                    return
                self._step(self.eager)

    def finish(self) -> None:
        with self.lock:
            for name in self.queues:
                while self.queues[name]:
                    self._step(name)

    # Lanes

    def host_buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, width), float("nan"), dtype=dtype)

    device_buffer = host_buffer

    def computed(self) -> Point:
        point = Point(self, "compute")
        self.add("compute", point)
        return point

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Point:
        point = Point(self, "copy")
        self.add("copy", (after,), lambda: target.copy_(source), point)
        return point

    def compute_after(self, event: Any) -> None:
        self.add("compute", (event,))

    def close(self) -> None:
        with self.lock:
            while self.queues["copy"]:
                self._step("copy")
        self.closed = True


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("eager", [None, "copy", "compute"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_a_device_sees_every_block_however_late_it_works(
    count: int, eager: str | None, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.arange(count * 3.0).reshape(count, 3)
    if pinned:
        monkeypatch.setattr(Rows, "pinned", lambda self: matrix)
    device = Device(eager)
    seen: list[tuple[int, torch.Tensor]] = []

    def look(first: int, block: torch.Tensor) -> Callable[[], None]:
        return lambda: seen.append((first, block.clone()))

    for first, block in copied(Rows(matrix), spans(count, 2), device):
        device.add("compute", look(first, block))
    device.finish()
    assert [first for first, _ in seen] == list(range(0, count, 2))
    assert torch.equal(torch.cat([block for _, block in seen]), matrix)
    assert device.closed


def test_a_failure_of_the_reader_or_the_caller_ends_the_copies() -> None:
    class Torn:
        shape, dtype = (6, 3), torch.float32

        def __getitem__(self, rows: slice) -> torch.Tensor:
            if rows.start == 4:
                raise OSError("gone")
            return torch.ones(2, 3)

    device = Device()
    with pytest.raises(OSError, match="gone"):
        for _ in copied(Rows(Torn()), spans(6, 2), device):
            pass
    assert device.closed
    device = Device()
    blocks = copied(Rows(torch.ones(9, 3)), spans(9, 2), device)
    next(blocks)
    blocks.close()
    assert device.closed
    assert not device.queues["copy"]


def test_the_next_block_is_read_while_the_present_one_is_scored() -> None:
    events: list[str] = []
    reading = threading.Event()

    class Watched:
        shape, dtype = (6, 3), np.dtype("float32")

        def __getitem__(self, rows: slice) -> np.ndarray:
            if rows.start == 2:
                reading.set()
            events.append(f"read {rows.start}")
            return np.full((2, 3), rows.start, dtype=np.float32)

    blocks = read_ahead(Rows(Watched()), spans(6, 2))
    first, block = next(blocks)
    assert first == 0
    assert reading.wait(10)  # block 1 comes without anybody asking
    time.sleep(0.05)
    assert "read 4" not in events  # its buffer is the one in use
    assert block.unique().tolist() == [0.0]
    assert [(at, rows.unique().tolist()) for at, rows in blocks] == [(2, [2.0]), (4, [4.0])]
    assert list(read_ahead(Rows(Watched()), [])) == []


def test_what_stays_in_place_and_what_is_read() -> None:
    array = np.ones((4, 2), dtype=np.float32)
    held = in_memory(array)
    assert isinstance(held, torch.Tensor)
    assert held.data_ptr() == array.ctypes.data
    fixed = array.copy()
    fixed.flags.writeable = False
    for other in (fixed, array[::-1], array.astype(">f4")):
        assert isinstance(in_memory(other), Rows)


def test_numpy_bfloat16_is_read_by_its_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = torch.randn(5, 3).bfloat16()
    array = values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    rows = Rows(array)
    assert rows.dtype is torch.bfloat16
    assert torch.equal(rows.read((1, 4), torch.empty(3, 3, dtype=torch.bfloat16)), values[1:4])


@pytest.mark.parametrize(
    ("block", "count", "expected"),
    [(None, 10**6, 43776), (None, 1000, 1024), (1, 1000, 256), (300, 10**6, 512), (5000, 700, 768)],
)
def test_blocks_are_whole_tiles(block: int | None, count: int, expected: int) -> None:
    assert block_rows(block, count, 1536, 4, stream.DEVICE_BLOCK_BYTES) == expected
