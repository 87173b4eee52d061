"""CUDA graphs of whole rollouts: recorded on first use, bounded in number and memory.

A graph replays the kernels of one recording on the same addresses, so what varies between
batches of a bucket must lie in memory the graph reads: inputs and lengths are copied into static
buffers, results are copied out. A recording is lost when what it points to moves (the arena, the
weights); the caller names those things by an identity.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ume_kernels.decode.workspace import ArrivalCounters, own_counters

MAX_GRAPHS = 16
MAX_BYTES = 1 << 30
ENVIRONMENT = "UME_GRAPHS"

Inputs = Mapping[str, torch.Tensor]
Body = Callable[[Inputs], Sequence[torch.Tensor]]


class CaptureError(RuntimeError):
    """A recording failed; the message says why."""


@dataclass(frozen=True)
class Recording:
    """A replayable recording and the device memory that it added to its pool."""

    replay: Callable[[], None]
    nbytes: int


class Recorder(Protocol):
    """Turns work on static buffers into something that can be replayed."""

    def record(self, work: Callable[[], None]) -> Recording:
        """Run ``work`` at least once (its own errors propagate), then record it.

        Raises:
            CaptureError: it runs but cannot be recorded.
        """

    def drain(self) -> None:
        """Wait for replays under way, before recordings are dropped."""

    def fresh_pool(self) -> None:
        """All recordings are gone: let their memory go with the next one."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool.

    Sharing is safe because nothing in the pool outlives a replay: inputs and outputs lie outside
    of it, and replays do not overlap (the rollout orders them by an event).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        # A replay may come from any stream, so these must be nobody else's.
        self._counters = ArrivalCounters()

    def record(self, work: Callable[[], None]) -> Recording:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            # Warm-up where the capture will run: kernels compile, and libraries allocate their
            # workspaces for this stream outside of the pool.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), own_counters(self._counters):
                work()
            self._stream.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate or load meanwhile.
                with (
                    own_counters(self._counters),
                    torch.cuda.graph(
                        graph, self._pool, self._stream, capture_error_mode="thread_local"
                    ),
                ):
                    work()
            except Exception as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            current.wait_stream(self._stream)
            return Recording(graph.replay, max(0, torch.cuda.memory_reserved() - before))

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

    def fresh_pool(self) -> None:
        self._pool = None


@dataclass(frozen=True)
class _Entry:
    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]
    recording: Recording
    keep: object


class GraphPool:
    """Recordings by key, least recently used first.

    Args:
        recorder: how to record; None runs everything eagerly.
        max_graphs: recordings held at once.
        max_bytes: device memory of their intermediates. The pool is shared, so it is given back
            only as a whole: over the limit all recordings go, and the newest is made again.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._identity: Hashable = None
        self._pool_bytes = 0
        self._refused: set[Hashable] = set()
        self._warned = False

    @classmethod
    def for_device(cls, device: torch.device) -> GraphPool:
        """CUDA graphs on a CUDA device, unless ``UME_GRAPHS=0``; nothing elsewhere."""
        wanted = os.environ.get(ENVIRONMENT, "1") != "0"
        return cls(CudaRecorder(device) if device.type == "cuda" and wanted else None)

    @property
    def enabled(self) -> bool:
        """Whether anything will be recorded."""
        return self._recorder is not None

    @property
    def nbytes(self) -> int:
        """Device memory that the recordings' intermediates hold."""
        return self._pool_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def run(
        self,
        key: Hashable,
        identity: Hashable,
        inputs: Inputs,
        rows: int,
        shapes: Sequence[tuple[int, ...]],
        body: Body,
        keep: object = None,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> tuple[torch.Tensor, ...] | None:
        """Replay the recording of ``body`` for ``key``, recording it first if there is none.

        Args:
            key: everything that ``body`` depends on besides values in ``inputs``.
            identity: names the memory that ``body`` reads and writes besides; when it changes,
                all recordings are dropped.
            inputs: tensors of at most ``rows`` rows; the rows that are missing become zeros.
            rows: rows of the bucket.
            shapes, dtypes: of the outputs of ``body``; the types are the first input's by default.
            body: the work, a function of tensors like ``inputs`` with ``rows`` rows. It reads no
                device value on the host and leaves its inputs unchanged.
            keep: what must stay alive as long as the recording.

        Returns:
            Copies of the outputs, or None when the caller must run ``body`` itself.
        """
        if self._recorder is None or key in self._refused:
            return None
        if identity != self._identity:
            self.clear()
            self._identity = identity
        entry = self._entries.get(key)
        if entry is None:
            like = next(iter(inputs.values()))
            types = dtypes or [like.dtype] * len(shapes)
            outputs = tuple(
                like.new_zeros(shape, dtype=dtype)
                for shape, dtype in zip(shapes, types, strict=True)
            )
            entry = self._record(self._recorder, key, inputs, rows, outputs, body, keep)
            if entry is None:
                return None
        else:
            self._entries.move_to_end(key)
            _fill(entry.inputs, inputs)
        entry.recording.replay()
        return tuple(out.clone() for out in entry.outputs)

    def clear(self) -> None:
        """Drop every recording, and its memory."""
        if self._recorder is not None and self._entries:
            self._recorder.drain()
            self._entries.clear()
            self._recorder.fresh_pool()
        self._pool_bytes = 0
        self._refused.clear()

    def _record(
        self,
        recorder: Recorder,
        key: Hashable,
        inputs: Inputs,
        rows: int,
        outputs: tuple[torch.Tensor, ...],
        body: Body,
        keep: object,
    ) -> _Entry | None:
        static = {name: x.new_zeros(rows, *x.shape[1:]) for name, x in inputs.items()}
        _fill(static, inputs)

        def work() -> None:
            for out, result in zip(outputs, body(static), strict=True):
                if result.shape != out.shape:
                    raise ValueError(f"body gave {tuple(result.shape)}, not {tuple(out.shape)}")
                out.copy_(result)

        while True:
            try:
                recording = recorder.record(work)
            except CaptureError as error:
                self._give_up(key, error)
                return None
            self._pool_bytes += recording.nbytes
            if self._pool_bytes <= self._max_bytes:
                break
            size, alone = recording.nbytes, not self._entries
            del recording
            self.clear()
            recorder.fresh_pool()
            if alone:
                self._refused.add(key)
                self._warn(
                    f"the graph of this rollout needs {size} bytes, more than the "
                    f"{self._max_bytes} that graphs may take"
                )
                return None
        if len(self._entries) >= self._max_graphs:
            recorder.drain()
            self._entries.popitem(last=False)
        entry = self._entries[key] = _Entry(static, outputs, recording, keep)
        return entry

    def _give_up(self, key: Hashable, error: CaptureError) -> None:
        """Eager from here on: for this key if memory ran out, else for all."""
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            self.clear()
            self._refused.add(key)
        else:
            self.clear()
            self._recorder = None
        self._warn((str(error).strip().splitlines() or ["no reason given"])[0])

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"rollouts run without a CUDA graph (slower, same results): {reason}",
                RuntimeWarning,
                stacklevel=2,
            )


def _fill(static: dict[str, torch.Tensor], inputs: Inputs) -> None:
    if static.keys() != inputs.keys():
        raise ValueError(f"recorded with {sorted(static)}, called with {sorted(inputs)}")
    for name, buffer in static.items():
        value = inputs[name]
        # copy_ would cast or broadcast what does not belong here
        if value.dtype != buffer.dtype or value.shape[1:] != buffer.shape[1:]:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, recorded as {buffer.dtype} "
                f"{tuple(buffer.shape)}"
            )
        if len(value) > len(buffer):
            raise ValueError(f"{name} has {len(value)} rows, its bucket {len(buffer)}")
        buffer[: len(value)].copy_(value)
        buffer[len(value) :].zero_()
