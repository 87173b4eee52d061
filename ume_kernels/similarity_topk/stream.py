"""Corpora that are not where they are scored: read block by block, one block ahead.

Host memory, memory-mapped files and anything that slices by rows come as ``Rows``. For a CPU a
thread reads the next block while the present one is scored. For a GPU the thread fills one of two
pinned buffers, a second stream copies it into one of two device buffers, and the present stream
scores the other: reading, copying and scoring overlap, and two blocks are all that is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from ume_kernels.similarity_topk.reference import whole_tiles

HOST_BLOCK_BYTES = 64 << 20
"""Bytes per block read for a CPU, where the caller does not say."""

DEVICE_BLOCK_BYTES = 256 << 20
"""Bytes per block copied to a GPU: some 5 ms of PCIe, far above the cost of starting a copy."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Span = tuple[int, int]
"""First row of a block and the one after its last."""


class RowSlices(Protocol):
    """A matrix that is read by slices of rows, as numpy, h5py and zarr arrays are."""

    @property
    def shape(self) -> Sequence[int]:
        """``(N, D)``."""
        ...

    @property
    def dtype(self) -> Any:
        """float32, float16 or bfloat16, of torch or numpy."""
        ...

    def __getitem__(self, rows: slice) -> Any:
        """These rows as a tensor or a numpy array."""
        ...


class Rows:
    """A corpus that is read block by block.

    Args:
        matrix: a CPU tensor, a numpy array (also memory-mapped), or any ``RowSlices``.

    Raises:
        ValueError: its dtype is not float32, float16 or bfloat16.
        TypeError: it has no shape, dtype or slices.
    """

    def __init__(self, matrix: torch.Tensor | RowSlices) -> None:
        for name in ("shape", "dtype", "__getitem__"):
            if not hasattr(matrix, name):
                raise TypeError(
                    "c must be a tensor, a numpy array, or have shape, dtype and slices of rows; "
                    f"{type(matrix).__name__} has no {name}"
                )
        dtype: Any = matrix.dtype
        # numpy's `name` leaves the byte order out, which assignments take care of
        name = getattr(dtype, "name", str(dtype)).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"c must be float32, float16 or bfloat16, got {dtype}")
        self._matrix = matrix
        self.dtype = _DTYPES[name]
        self.shape = torch.Size(int(size) for size in matrix.shape)

    def pinned(self) -> torch.Tensor | None:
        """The matrix itself if a GPU can copy from it at full speed."""
        matrix = self._matrix
        if isinstance(matrix, torch.Tensor) and matrix.is_contiguous() and matrix.is_pinned():
            return matrix
        return None

    def read(self, span: Span, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the rows of ``span``; returns it.

        Raises:
            ValueError: the slice is not of the shape that the corpus told.
        """
        start, stop = span
        found = self._matrix[start:stop]
        if tuple(found.shape) != tuple(out.shape):
            raise ValueError(
                f"rows {start} … {stop - 1} of c have shape {tuple(found.shape)}, "
                f"but must be {tuple(out.shape)}"
            )
        if isinstance(found, torch.Tensor):
            return out.copy_(found)
        bits = str(found.dtype) == "bfloat16"  # a dtype of ml_dtypes, which torch does not take
        target = out.view(torch.int16).numpy() if bits else out.numpy()
        target[...] = found.view(np.int16) if bits else found
        return out


def in_memory(c: torch.Tensor | RowSlices) -> torch.Tensor | Rows:
    """A tensor where ``c`` is one or can be seen as one without a copy, else its ``Rows``.

    Raises:
        ValueError, TypeError: as ``Rows``.
    """
    if isinstance(c, torch.Tensor):
        return c
    # Not a memory-mapped one, which is a subclass: its pages are read ahead by a thread.
    if type(c) is np.ndarray and c.flags.writeable and c.dtype.isnative:
        array: np.ndarray = c
        if min(array.strides, default=0) >= 0 and array.dtype.name in ("float32", "float16"):
            return torch.from_numpy(array)
    return Rows(c)


def block_rows(block: int | None, count: int, width: int, itemsize: int, budget: int) -> int:
    """Rows of a block: ``block``, else what fits ``budget`` bytes, in whole tiles."""
    wanted = budget // max(1, width * itemsize) if block is None else block
    return min(whole_tiles(max(1, wanted)), whole_tiles(count))


def spans(count: int, step: int) -> list[Span]:
    """Blocks of ``step`` rows over ``count``."""
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def read_ahead(rows: Rows, wanted: Sequence[Span]) -> Iterator[tuple[int, torch.Tensor]]:
    """The first row and the content of every block, in CPU memory.

    A block is valid until the next one is asked for.
    """
    height = max((stop - start for start, stop in wanted), default=0)
    buffers = [torch.empty(height, rows.shape[1], dtype=rows.dtype) for _ in wanted[:2]]

    def read(number: int) -> torch.Tensor:
        start, stop = wanted[number]
        return rows.read((start, stop), buffers[number % 2][: stop - start])

    with ThreadPoolExecutor(1, "ume-read") as reader:
        coming = reader.submit(read, 0) if wanted else None
        for number, (start, _) in enumerate(wanted):
            assert coming is not None
            block = coming.result()
            # Into the buffer whose block has been scored: this runs when the next is asked for.
            if number + 1 < len(wanted):
                coming = reader.submit(read, number + 1)
            yield start, block


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait on the host until the work before it is done."""
        ...


class Lanes(Protocol):
    """The two streams of a device: one copies, the other, the caller's, computes."""

    def host_buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that the device copies from without stopping the host."""
        ...

    def device_buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""
        ...

    def computed(self) -> Event:
        """The point after all computing so far."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """Queue a copy that starts after a point of the computing; returns its end."""
        ...

    def compute_after(self, event: Event) -> None:
        """Let later computing wait for a copy."""
        ...

    def close(self) -> None:
        """Wait until no copy is under way."""
        ...


class CudaLanes:
    """Lanes of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._computing = torch.cuda.current_stream(device)
        self._copying = torch.cuda.Stream(device)

    def host_buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, pin_memory=True)

    def device_buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=self._device)

    def computed(self) -> torch.cuda.Event:
        return self._computing.record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> torch.cuda.Event:
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def compute_after(self, event: Any) -> None:
        self._computing.wait_event(event)

    def close(self) -> None:
        self._copying.synchronize()


def copied(rows: Rows, wanted: Sequence[Span], lanes: Lanes) -> Iterator[tuple[int, torch.Tensor]]:
    """The first row and the content of every block, in the device's memory.

    A block is valid for the computing queued before the next one is asked for.
    """
    height = max((stop - start for start, stop in wanted), default=0)
    size = (height, rows.shape[1], rows.dtype)
    pinned = rows.pinned()
    host = [] if pinned is not None else [lanes.host_buffer(*size) for _ in wanted[:2]]
    device = [lanes.device_buffer(*size) for _ in wanted[:2]]
    # Memory of the device may come from a tensor that work in the queue still uses.
    free = [lanes.computed() for _ in device]
    sent: list[Event | None] = [None, None]

    def read(number: int) -> torch.Tensor:
        start, stop = wanted[number]
        if pinned is not None:
            return pinned[start:stop]
        before = sent[number % 2]
        if before is not None:
            before.synchronize()
        return rows.read((start, stop), host[number % 2][: stop - start])

    with ThreadPoolExecutor(1, "ume-read") as reader:
        try:
            coming = reader.submit(read, 0) if wanted else None
            for number, (start, stop) in enumerate(wanted):
                assert coming is not None
                slot = number % 2
                block = device[slot][: stop - start]
                arrived = lanes.copy(block, coming.result(), free[slot])
                sent[slot] = arrived
                if number + 1 < len(wanted):
                    coming = reader.submit(read, number + 1)
                lanes.compute_after(arrived)
                yield start, block
                free[slot] = lanes.computed()
        finally:
            lanes.close()
