"""Plots with one line of the page per case: speed-ups, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ume_models.cli.bench.figures import Figure, Role, best, groups
from ume_models.cli.bench.style import COLOURS, FAINT, INK, MARKERS, NAMES, axes, legend
from ume_models.cli.bench.style import logarithmic as logarithmic_axis

_OTHERS: tuple[Role, ...] = ("reference", "rival")
_BEST = {"reference": "than the reference path", "rival": "than the best rival"}


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster this package is in one group; None where there is no such engine."""

    group: str
    reference: float | None
    rival: float | None


def speed_ups(figures: Sequence[Figure]) -> list[SpeedUp]:
    """Ratios of the best time per sample of each role to our best, for every group with both."""
    found = []
    for name, members in groups(figures).items():
        mine = best(members, "ours")
        if mine is None:
            continue
        ratios = [
            None if other is None else other.per_sample / mine.per_sample
            for other in (best(members, role) for role in _OTHERS)
        ]
        if any(ratio is not None for ratio in ratios):
            found.append(SpeedUp(name, *ratios))
    return found


def _strip_axes(names: Sequence[str]) -> tuple[Any, Any]:
    picture, area = axes(9.0, 1.1 + 0.27 * len(names))
    area.set_yticks(range(len(names)), names, fontsize=8)
    area.set_ylim(len(names) - 0.4, -0.6)
    area.grid(False, axis="y")
    area.tick_params(axis="y", length=0)
    return picture, area


def _times(ratio: float) -> str:
    """Two decimals near 1, where they matter."""
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}×"


def speed_up_plot(rows: Sequence[SpeedUp]) -> Any:
    """A mark for the reference and one for the best rival per case, on a logarithmic axis."""
    picture, area = _strip_axes([row.group for row in rows])
    for number, row in enumerate(rows):
        ends = [ratio for ratio in (row.reference, row.rival) if ratio is not None]
        area.plot([1, *ends], [number] * (1 + len(ends)), color=FAINT, linewidth=1.5, zorder=1)
        furthest = max(*ends, 1.0)
        area.annotate(
            " / ".join(_times(end) for end in ends),
            (furthest, number), (7, 0), textcoords="offset points", va="center", fontsize=7,
            color=INK,
        )  # fmt: skip
    for role in _OTHERS:
        marks = [(value, n) for n, row in enumerate(rows) if (value := getattr(row, role))]
        if marks:
            area.scatter(
                [value for value, _ in marks], [at for _, at in marks], s=32, zorder=3,
                color=COLOURS[role], marker=MARKERS[role], label=_BEST[role],
            )  # fmt: skip
    area.axvline(1, color=INK, linewidth=1)
    area.set_xscale("log")
    left, right = area.get_xlim()
    area.set_xlim(min(left, 0.9), right * 1.4)
    logarithmic_axis(area.xaxis, "×")
    area.set_xlabel("this package is faster by (left of 1×: slower)")
    legend(area)
    return picture


def roofline_plot(figures: Sequence[Figure]) -> Any:
    """Bars for this package's share of the floor, marks for the others in the same group."""
    rows = [
        (name, best(members, "ours"), [f for f in members if f.role != "ours" and f.of_floor])
        for name, members in groups(figures).items()
    ]
    picture, area = _strip_axes([name for name, _, _ in rows])
    for number, (_, mine, others) in enumerate(rows):
        share = 0.0 if mine is None else 100 * (mine.of_floor or 0)
        area.barh(number, share, height=0.6, color=COLOURS["ours"], alpha=0.6, label=NAMES["ours"])
        for other in others:
            value = 100 * (other.of_floor or 0)
            area.scatter(
                value, number, s=30, color=COLOURS[other.role], marker=MARKERS[other.role],
                edgecolor="white", linewidth=0.6, zorder=3,
                label=NAMES[other.role],
            )  # fmt: skip
        area.text(
            1.01, number, f"{share:.0f} %", transform=area.get_yaxis_transform(), va="center",
            fontsize=8, color=COLOURS["ours"],
        )  # fmt: skip
    area.set_xlim(0, max(100.0, area.get_xlim()[1]) * 1.02)
    area.axvline(100, color=INK, linewidth=1)
    area.set_xlabel("share of the roofline in %: least possible time over measured time")
    legend(area)
    return picture
