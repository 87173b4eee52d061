"""Figures of a GPU session: one JSON line per figure, written at once; one file in the end.

A run that is cut loses only the figure it was measuring. A dry run (tiny sizes on a CPU) writes the
same files with ``dry_run`` true, and ``ume bench report`` refuses them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.datasheets import this_gpu
from benchmarks.gpu.timing import Timing
from benchmarks.machine import describe, gpu, versions

LINES = "figures.jsonl"
RESULTS = "results.json"


class Recorder:
    """Appends figures of one step to ``figures.jsonl``.

    Args:
        out: folder of the session.
        step: name of the step.
        dry_run: written into every line.
    """

    def __init__(self, out: Path, step: str, dry_run: bool) -> None:
        self.path = out / LINES
        self.step = step
        self.dry_run = dry_run

    def add(
        self,
        name: str,
        timing: Timing,
        *,
        samples: int = 1,
        bytes_read: float | None = None,
        ratio_to: Mapping[str, float] | None = None,
        **detail: Any,
    ) -> dict[str, Any]:
        """One duration.

        Args:
            name: what was measured, unique in a session.
            timing: seconds per call.
            samples: inputs per call; the value is seconds per call all the same.
            bytes_read: least bytes a call must move: gives the floor at datasheet bandwidth.
            ratio_to: seconds per call of what it is compared with; the ratio is written.
            detail: whatever else is worth keeping.
        """
        gpu = this_gpu()
        floor = None if bytes_read is None or gpu is None else bytes_read / gpu.bandwidth
        return self._write(
            {
                "name": name,
                "value": timing.median,
                "unit": "s",
                "p20": timing.p20,
                "p80": timing.p80,
                "rounds": timing.rounds,
                "samples": samples,
                "bytes": bytes_read,
                "floor": floor,
                "of_floor": None if floor is None else floor / timing.median,
                "ratio_to": {k: v / timing.median for k, v in (ratio_to or {}).items()},
                "detail": detail,
                "nvml": timing.nvml,
            }
        )

    def rate(self, name: str, value: float, unit: str, timing: Timing, **detail: Any) -> None:
        """A rate such as bytes per second."""
        self._write(
            {
                "name": name,
                "value": value,
                "unit": unit,
                "floor": None,
                "ratio_to": {},
                "detail": detail,
                "nvml": timing.nvml,
            }
        )

    def missed(self, name: str, reason: BaseException | str) -> None:
        """Something that could not be measured, and why."""
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        self._write({"name": name, "missed": text.strip()[:600]})

    def _write(self, figure: dict[str, Any]) -> dict[str, Any]:
        figure = {"step": self.step, **figure, "dry_run": self.dry_run}
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(figure) + "\n")
        if not self.dry_run:
            print(line(figure), flush=True)
        return figure


def line(figure: Mapping[str, Any]) -> str:
    """A figure in one line of text."""
    if "missed" in figure:
        return f"{figure['name']}: not measured: {figure['missed'][:160]}"
    if figure["unit"] != "s":
        return f"{figure['name']}: {figure['value']:.4g} {figure['unit']}"
    text = f"{figure['name']}: {figure['value'] * 1e3:.4f} ms"
    if figure["of_floor"] is not None:
        text += f", {figure['of_floor']:.0%} of the floor {figure['floor'] * 1e3:.4f} ms"
    return text + "".join(f", {r:.2f}x {name}" for name, r in figure["ratio_to"].items())


def read(out: Path) -> list[dict[str, Any]]:
    """The figures written so far."""
    path = out / LINES
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]


def collect(out: Path, steps: list[dict[str, Any]], dry_run: bool) -> dict[str, Any]:
    """Everything a session found so far, written to ``results.json`` as well."""
    figures = read(out)
    results = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "dry_run": dry_run or any(figure["dry_run"] for figure in figures),
        "machine": {**describe(), "gpu": gpu()},
        "versions": versions(),
        "steps": steps,
        "figures": figures,
    }
    partial = out / f"{RESULTS}.part"
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / RESULTS)
    return results
