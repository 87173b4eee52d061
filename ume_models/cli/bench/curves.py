"""Plots along a number: throughput over the batch, time over the latent steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ume_models.cli.bench.figures import Figure, Role
from ume_models.cli.bench.style import COLOURS, MARKERS, axes, legend, logarithmic

_LINES = ("-", "--")


@dataclass(frozen=True)
class Curve:
    """Points of one engine along one number, while another number is held.

    Attributes:
        engine, role: whose it is.
        held: value of the other number; None where there is none.
        rank: 0 for the largest held value, 1 for the smallest: the line's dashes.
        points: pairs of the number and the figure, ascending.
    """

    engine: str
    role: Role
    held: int | None
    rank: int
    points: Sequence[tuple[int, Figure]]


def curves(
    figures: Sequence[Figure],
    along: Callable[[Figure], int | None],
    held: Callable[[Figure], int | None],
) -> list[Curve]:
    """Curves of every engine at the largest and at the smallest value that is held.

    An engine with one point is kept, such as a path that takes one sample at a time. Empty unless
    some curve has two points. Of several figures at one point the fastest per sample counts.
    """
    usable = [figure for figure in figures if along(figure) is not None]
    known = sorted({value for figure in usable if (value := held(figure)) is not None})
    values: list[int | None] = list(dict.fromkeys([*known[-1:], *known[:1]])) or [None]
    found = []
    for rank, value in enumerate(values):
        members = [figure for figure in usable if held(figure) == value]
        for engine in dict.fromkeys(figure.engine for figure in members):
            points: dict[int, Figure] = {}
            for figure in (member for member in members if member.engine == engine):
                at = along(figure)
                assert at is not None
                if at not in points or figure.per_sample < points[at].per_sample:
                    points[at] = figure
            role = next(iter(points.values())).role
            found.append(Curve(engine, role, value, rank, sorted(points.items())))
    return found if any(len(curve.points) > 1 for curve in found) else []


def throughput(lines: Sequence[Curve]) -> Any:
    """Samples per second over the batch; a path of one batch size is drawn as a level."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    picture, area = axes(6.6, 4.4)
    batches = sorted({at for line in lines for at, _ in line.points})
    for line in lines:
        _draw(area, line, lambda figure: figure.rate, "K = {}")
        if len(line.points) == 1 and line.points[0][0] == batches[0]:
            level = [line.points[0][1].rate] * 2
            area.plot(
                [batches[0], batches[-1]], level, _LINES[line.rank], color=COLOURS[line.role],
                linewidth=1,
            )  # fmt: skip
    area.set_xscale("log", base=2)
    area.xaxis.set_major_locator(FixedLocator(batches))
    area.xaxis.set_minor_locator(NullLocator())
    area.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    area.set_yscale("log")
    logarithmic(area.yaxis)
    area.set_xlabel("batch")
    area.set_ylabel("samples per second")
    legend(area)
    return picture


def latency(lines: Sequence[Curve]) -> Any:
    """Milliseconds per call over the latent steps K."""
    from matplotlib.ticker import FixedLocator

    picture, area = axes(6.6, 4.4)
    for line in lines:
        _draw(area, line, lambda figure: figure.seconds * 1e3, "batch {}")
    area.xaxis.set_major_locator(FixedLocator(sorted({k for c in lines for k, _ in c.points})))
    area.set_yscale("log")
    logarithmic(area.yaxis)
    area.set_xlabel("latent steps K")
    area.set_ylabel("milliseconds per call")
    legend(area)
    return picture


def _draw(area: Any, line: Curve, value: Callable[[Figure], float], held: str) -> None:
    label = line.engine if line.held is None else f"{line.engine}, {held.format(line.held)}"
    area.plot(
        [at for at, _ in line.points],
        [value(figure) for _, figure in line.points],
        _LINES[line.rank],
        color=COLOURS[line.role],
        marker=MARKERS[line.role],
        markersize=5,
        linewidth=2.2 if line.role == "ours" else 1.4,
        zorder=3 if line.role == "ours" else 2,
        label=label,
    )
