"""Tile configurations, from JSON files beside the kernels: no autotuning at run time.

A room keeps ``tuning/default.json`` and one file per measured device, named after it
(``nvidia_h200.json``)::

    {"device": "default", "kernels": {"fc1": [
        {"max_rows": 4, "BLOCK_N": 8, "num_warps": 4},
        {"max_rows": null, "BLOCK_N": 64, "num_warps": 8}]}}

The first entry whose ``max_rows`` is not below the number of rows applies. A device file may name
some kernels only; the default file has them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

Config = Mapping[str, Any]

INTERPRETER = "interpreter.json"

_HERE = Path(__file__).parent


def device_file(name: str) -> str:
    """File name of a device's table: ``NVIDIA H200`` → ``nvidia_h200.json``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"


@cache
def _table(room: str, file: str) -> Mapping[str, list[dict[str, Any]]] | None:
    path = _HERE / room / "tuning" / file
    if not path.exists():
        return None
    try:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        open_ended = {name: bool(e) and e[-1]["max_rows"] is None for name, e in kernels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a tuning table ({error!r})") from error
    for name, last_is_open in open_ended.items():
        if not last_is_open:
            raise ValueError(f"{path}: the last entry of {name!r} must have max_rows null")
    return dict(kernels)


@cache
def _device_file(index: int) -> str:
    return device_file(torch.cuda.get_device_name(index))


@cache
def _config(room: str, kernel: str, rows: int, file: str) -> Config:
    for candidate in (file, "default.json"):
        table = _table(room, candidate)
        if table is not None and kernel in table:
            for entry in table[kernel]:
                if entry["max_rows"] is None or rows <= entry["max_rows"]:
                    return MappingProxyType({k: v for k, v in entry.items() if k != "max_rows"})
    raise KeyError(f"no configuration of {kernel!r} in {room}/tuning")


def config(room: str, kernel: str, rows: int, device: torch.device) -> Config:
    """The configuration of ``kernel`` for so many rows on ``device``; the default elsewhere.

    CPU tensors mean the interpreter, which may have a table ``interpreter.json`` of its own.
    """
    file = _device_file(device.index or 0) if device.type == "cuda" else INTERPRETER
    return _config(room, kernel, rows, file)


def shipped(room: str) -> Iterator[tuple[str, str, Config]]:
    """Every (file, kernel, entry) that the package ships for GPUs in ``room``."""
    for path in sorted((_HERE / room / "tuning").glob("*.json")):
        if path.name == INTERPRETER:
            continue
        for kernel, entries in (_table(room, path.name) or {}).items():
            for entry in entries:
                yield path.stem, kernel, MappingProxyType(dict(entry))
