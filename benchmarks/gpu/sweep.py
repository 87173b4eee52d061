"""Which configuration is fastest: Triton or cuBLAS per GEMM and rows, then neighbouring tiles.

Writes a proposed tuning table per room beside the results (``decode_nvidia_h200.json``), to be
read and then put into ``ume_kernels/<room>/tuning``. Every candidate is checked against PyTorch
before it is timed, and one that does not compile is passed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.layers import SIZES, layer_bytes, random_layer, step_of
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Timing, Work, in_one_graph, measure
from benchmarks.shaped import SHAPES
from ume_kernels import MoETransition, decode_layer, moe_transition, tuning

Entry = dict[str, Any]

CHUNK = 6
"""New tokens per row of the last pass; rows that are a multiple of it are such a chunk."""

FIXED = frozenset({"DOT", "PROGRAMS", "BLOCK_M", "ROWS"})
"""Not varied: they follow from the rows or from the device."""

WORTH = 0.98
"""A candidate replaces a configuration when it takes less than this share of its time."""


@contextmanager
def configured(room: str, kernel: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``kernel`` of ``room`` runs with ``entry`` whatever its rows."""
    original = tuning._config

    def overridden(asked: str, name: str, rows: int, file: str) -> Mapping[str, Any]:
        if (asked, name) == (room, kernel):
            return MappingProxyType(dict(entry))
        return original(asked, name, rows, file)

    tuning._config = overridden  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning._config = original


@contextmanager
def asked(room: str) -> Iterator[set[str]]:
    """Inside, collects the kernels of ``room`` whose configuration is asked for."""
    original = tuning._config
    names: set[str] = set()

    def noting(asked_room: str, name: str, rows: int, file: str) -> Mapping[str, Any]:
        if asked_room == room:
            names.add(name)
        return original(asked_room, name, rows, file)

    tuning._config = noting  # type: ignore[assignment]
    try:
        yield names
    finally:
        tuning._config = original


def neighbours(entry: Mapping[str, Any]) -> Iterator[Entry]:
    """Entries that differ from ``entry`` in one number."""
    for key, value in entry.items():
        if key in FIXED or isinstance(value, bool) or not isinstance(value, int):
            continue
        if key == "STAGES":
            steps = [value - 1, value + 1]
        elif key == "num_warps":
            steps = [w for w in (2, 4, 8) if w != value]
        else:
            steps = [value // 2, value * 2]
        for step in steps:
            if step >= 1:
                yield {**entry, key: step}


def tables(room: str) -> dict[str, list[Entry]]:
    """Kernels of a room with their entries, of this device's table where it has one."""
    found: dict[str, list[Entry]] = {}
    own = None
    if torch.cuda.is_available():
        own = tuning.device_file(torch.cuda.get_device_name(0)).removesuffix(".json")
    for stem, kernel, entry in tuning.shipped(room):
        if stem == "default":
            found.setdefault(kernel, []).append(dict(entry))
    replaced: dict[str, list[Entry]] = {}
    for stem, kernel, entry in tuning.shipped(room):
        if stem == own:
            replaced.setdefault(kernel, []).append(dict(entry))
    return {**found, **replaced}


def entry_for(entries: list[Entry], rows: int) -> Entry:
    """The entry that applies to ``rows``, without its bound."""
    for entry in entries:
        if entry["max_rows"] is None or rows <= entry["max_rows"]:
            return {k: v for k, v in entry.items() if k != "max_rows"}
    raise KeyError(rows)


@dataclass(frozen=True)
class Bench:
    """One operation at one number of rows.

    Attributes:
        room, rows: which, and how many.
        calls: on different weights.
        check: relative error of its result against PyTorch's.
        floor: bytes a call must read.
        tile: rows of an attention tile, None where attention is too small a part to be swept.
    """

    room: str
    rows: int
    calls: list[Work]
    check: Callable[[], float]
    floor: int
    tile: int | None = None

    def key(self, kernel: str) -> int | None:
        """The number of rows that ``kernel``'s table is about; None: not to be swept here."""
        return self.tile if kernel.startswith("attend") else self.rows


def decode_bench(sizes: Sizes, rows: int) -> Bench:
    """A decoder layer over ``rows`` tokens, rotating among several layers' weights."""
    size = SIZES[sizes.shape]
    queries = CHUNK if rows % CHUNK == 0 else 1
    batch, length = rows // queries, sizes.short[1] if rows < 8 * queries else sizes.long[1]
    capacity = length + 16
    layers = [random_layer(size, sizes.device, sizes.dtype, n) for n in range(sizes.sets)]
    lengths = torch.full((batch,), length, device=sizes.device)
    step = step_of(size, lengths, queries, capacity, sizes.dtype)
    kv = (batch, size.kv_heads, capacity, size.head_dim)
    keys, values = torch.randn(2, *kv, device=sizes.device).to(sizes.dtype).unbind(0)
    x = torch.randn(batch, queries, size.width, device=sizes.device).to(sizes.dtype)

    def run(n: int, backend: str = "triton") -> torch.Tensor:
        return decode_layer(x, step, keys, values, layers[n], size.shape, backend=backend)

    expected = run(0, "torch").float()

    def error() -> float:
        return float((run(0).float() - expected).norm() / expected.norm())

    read = layer_bytes(layers[0]) + 2 * keys[:, :, :length].nbytes
    calls: list[Work] = [lambda n=n: run(n) for n in range(sizes.sets)]  # type: ignore[misc]
    tile = size.heads // size.kv_heads * queries if batch == sizes.long[0] else None
    return Bench("decode", rows, calls, error, read, tile)


def adapter_bench(sizes: Sizes, rows: int) -> Bench:
    """The adapter at ``rows`` rows, rotating among several adapters."""
    width = SHAPES[sizes.shape]["hidden_size"]
    modules = [
        MoETransition(width).to(sizes.device, sizes.dtype).requires_grad_(False).pack_experts()
        for _ in range(sizes.sets)
    ]
    z, context = torch.randn(2, rows, width, device=sizes.device).to(sizes.dtype).unbind(0)
    weights = [module.weights().stacked() for module in modules]

    def run(n: int, backend: str = "triton") -> torch.Tensor:
        return moe_transition(z, context, 3, weights[n], modules[n].top_k, backend=backend)[0]

    expected = run(0, "torch").float()

    def error() -> float:
        # by row: where bfloat16 flips a near tie between experts the row differs, and may
        distance = (run(0).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        return float(distance.median())

    read = sum(p.nbytes for p in modules[0].parameters())
    calls: list[Work] = [lambda n=n: run(n) for n in range(sizes.sets)]  # type: ignore[misc]
    return Bench("moe_transition", rows, calls, error, read)


@torch.no_grad()
def run(sizes: Sizes, record: Recorder, seconds: float) -> None:
    """Sweep until the time is over; the most wanted rows come first."""
    until = time.perf_counter() + seconds
    out = record.path.parent
    best: dict[str, dict[str, dict[int, Entry]]] = {"decode": {}, "moe_transition": {}}
    makers = {"decode": decode_bench, "moe_transition": adapter_bench}
    for tiles in (False, True):
        for rows in sizes.sweep_rows:
            for room, make in makers.items():
                if room == "moe_transition" and (not tiles or rows > 64 or rows % CHUNK == 0):
                    continue  # it has no cuBLAS form, and a row is a row of the batch
                if time.perf_counter() > until:
                    record.missed(f"sweep of {room} at {rows} rows", "the time was over")
                    continue
                try:
                    bench = make(sizes, rows)
                    _sweep(bench, best[room], tiles, sizes, record, until)
                except Exception as error:
                    record.missed(f"sweep of {room} at {rows} rows", error)
                    if sizes.device.type == "cuda" and "CUDA error" in str(error):
                        return
                write_proposal(out, room, best[room], record.dry_run)


def _sweep(
    bench: Bench,
    best: dict[str, dict[int, Entry]],
    tiles: bool,
    sizes: Sizes,
    record: Recorder,
    until: float,
) -> None:
    with asked(bench.room) as used:
        allowed = 2 * bench.check() + 1e-6
    base = _time(bench, sizes)
    for kernel, entries in tables(bench.room).items():
        rows = bench.key(kernel)
        if kernel not in used or rows is None:
            continue
        start = best.get(kernel, {}).get(rows) or entry_for(entries, rows)
        candidates = list(islice(_candidates(start, entries, tiles), sizes.candidates))
        if len(candidates) < 2:
            continue
        tried: list[tuple[float, Entry]] = []
        for entry in candidates:
            if time.perf_counter() > until and tried:
                break
            try:
                with configured(bench.room, kernel, entry):
                    if not bench.check() <= allowed:
                        continue
                    timing = _time(bench, sizes)
            except Exception as error:
                if sizes.device.type == "cuda" and "CUDA error" in str(error):
                    raise
                continue  # does not compile: too much shared memory, say
            tried.append((timing.median, entry))
        if not tried:
            continue
        first = next((t for t, entry in tried if entry == start), base.median)
        fastest, entry = min(tried, key=lambda pair: pair[0])
        if fastest > WORTH * first:
            fastest, entry = first, start
        best.setdefault(kernel, {})[rows] = entry
        record.add(
            f"sweep of {bench.room} {kernel} at {bench.rows} rows, "
            + ("tiles" if tiles else "Triton or cuBLAS"),
            base,
            samples=bench.rows,
            bytes_read=bench.floor,
            ratio_to={},
            chosen=entry,
            seconds_with_it=fastest,
            tried=[{"seconds": t, **e} for t, e in sorted(tried, key=lambda pair: pair[0])[:8]],
        )


def _time(bench: Bench, sizes: Sizes) -> Timing:
    if sizes.device.type != "cuda":  # a dry run in the interpreter, where a call takes a second
        return measure(bench.calls[0], sizes.device, seconds=0, rounds=(1, 1), warm_up=0)
    replay = in_one_graph(bench.calls, sizes.device)
    return measure(replay, sizes.device, seconds=0.05).per(len(bench.calls))


def _candidates(start: Entry, entries: list[Entry], tiles: bool) -> Iterator[Entry]:
    yield start
    if "gemm" in start and not tiles:
        if start["gemm"] == "triton":
            yield {"gemm": "cublas"}
        else:
            for entry in reversed(entries):
                if entry["gemm"] == "triton":
                    yield {k: v for k, v in entry.items() if k != "max_rows"}
                    break
    if tiles:
        yield from neighbours(start)


def write_proposal(
    out: Path, room: str, best: Mapping[str, Mapping[int, Entry]], dry_run: bool
) -> Path | None:
    """The table that the sweep so far speaks for; kernels it did not reach keep the default."""
    if not best:
        return None
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "dry run"
    kernels: dict[str, list[Entry]] = {}
    for kernel, by_rows in best.items():
        entries: list[Entry] = []
        for rows in sorted(by_rows):
            entry = {"max_rows": rows, **by_rows[rows]}
            if entries and {**entries[-1], "max_rows": rows} == entry:
                entries.pop()  # one entry serves both
            entries.append(entry)
        top = max(by_rows)
        default = tables(room)[kernel]
        larger = [e for e in default if e["max_rows"] is None or e["max_rows"] > top]
        entries += larger
        kernels[kernel] = entries
    path = out / f"{room}_{tuning.device_file(name)}"
    table = {"device": name, "measured": not dry_run, "kernels": kernels}
    path.write_text(one_entry_per_line(table), encoding="utf-8")
    return path


def one_entry_per_line(table: Mapping[str, Any]) -> str:
    """The table as JSON, laid out like the shipped ones."""
    blocks = []
    for kernel, entries in table["kernels"].items():
        listed = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        blocks.append(f'    "{kernel}": [\n{listed}\n    ]')
    head = "".join(f'  "{k}": {json.dumps(v)},\n' for k, v in table.items() if k != "kernels")
    return "{\n" + head + '  "kernels": {\n' + ",\n".join(blocks) + "\n  }\n}\n"
