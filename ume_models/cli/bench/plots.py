"""The plots that a file of results gives, drawn as PNG and SVG: one colour and mark per role.

matplotlib is imported when something is drawn, so that tables need nothing but this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ume_models.atomic import replacing
from ume_models.cli.bench.figures import Figure, Results, Role, best, groups

MISSING = "no plots, tables only: matplotlib is not installed; pip install matplotlib"

_DOTS_PER_INCH = 150
_COLOURS: dict[Role, str] = {
    "ours": "#1f5fbf", "reference": "#6b7280", "rival": "#d97706", "ablation": "#7e57c2",
}  # fmt: skip
_MARKERS: dict[Role, str] = {"ours": "o", "reference": "s", "rival": "^", "ablation": "D"}
_NAMES: dict[Role, str] = {
    "ours": "this package", "reference": "reference path", "rival": "rivals",
    "ablation": "this package without a part",
}  # fmt: skip
_OTHERS: dict[Role, str] = {
    "reference": "than the reference path", "rival": "than the best rival",
}  # fmt: skip
_INK, _FAINT = "#374151", "#d1d5db"
_LINES = ("-", "--")


@dataclass(frozen=True)
class Plot:
    """A picture in ``NAME.png`` and ``NAME.svg``, and the content of the latter."""

    name: str
    title: str
    svg: str


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


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster this package is in one group; None where there is no such engine."""

    group: str
    reference: float | None
    rival: float | None


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        return find_spec("matplotlib") is not None
    except ValueError:
        return False


def draw(results: Results, folder: Path, prefix: str = "") -> list[Plot]:
    """Draw every plot that there are figures for.

    Args:
        results: one file.
        folder: where the PNG and SVG files go; it exists.
        prefix: beginning of the files' names.

    Raises:
        ImportError: matplotlib is not installed (``available`` tells).
        OSError: a file cannot be written; it is named.
    """
    import matplotlib

    plots = []
    for stem, title, paint in _wanted(results):
        name = prefix + stem
        # Text stays text, and equal figures give equal bytes.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            picture = paint()
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                with replacing(folder / f"{name}.{kind}") as temporary:
                    picture.savefig(
                        temporary, format=kind, dpi=_DOTS_PER_INCH, facecolor="white",
                        metadata=metadata,
                    )  # fmt: skip
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        plots.append(Plot(name, title, svg))
    return plots


def _wanted(results: Results) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """File name, title and painter of every plot that there are figures for."""
    compared = speed_ups(results.figures)
    if compared:
        title = "How many times faster than the reference path / the best rival"
        yield "speed-up", title, partial(_speed_up_plot, compared)
    for section, figures in results.sections().items():
        stem = section.replace(" ", "-")
        over_batch = curves(figures, lambda f: f.batch, lambda f: f.steps)
        if over_batch:
            title = f"Throughput over batch: {section}"
            yield f"throughput-{stem}", title, partial(_throughput, over_batch)
        over_steps = curves(figures, lambda f: f.steps, lambda f: f.batch)
        if over_steps:
            title = f"Time over latent steps: {section}"
            yield f"latency-{stem}", title, partial(_latency, over_steps)
    bounded = [figure for figure in results.figures if figure.floor is not None]
    if bounded:
        yield "roofline", "Share of the roofline", partial(_roofline_plot, bounded)


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


def speed_ups(figures: Sequence[Figure]) -> list[SpeedUp]:
    """Ratios of the best time per sample of each role to our best, for every group with both."""
    found = []
    for name, members in groups(figures).items():
        mine = best(members, "ours")
        others = [best(members, role) for role in _OTHERS]
        if mine is not None and any(others):
            ratios = [None if one is None else one.per_sample / mine.per_sample for one in others]
            found.append(SpeedUp(name, *ratios))
    return found


def _throughput(lines: Sequence[Curve]) -> Any:
    """Samples per second over the batch; a path of one batch size is drawn as a level."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    picture, area, batches = _curve_axes(lines, "batch", "samples per second")
    area.set_xscale("log", base=2)  # sets locators anew
    area.xaxis.set_major_locator(FixedLocator(batches))
    area.xaxis.set_minor_locator(NullLocator())
    area.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for line in lines:
        _draw(area, line, lambda figure: figure.rate, "K = {}")
        if len(line.points) == 1 and line.points[0][0] == batches[0]:
            ends, level = [batches[0], batches[-1]], [line.points[0][1].rate] * 2
            area.plot(ends, level, _LINES[line.rank], color=_COLOURS[line.role], linewidth=1)
    _legend(area)
    return picture


def _latency(lines: Sequence[Curve]) -> Any:
    """Milliseconds per call over the latent steps K."""
    picture, area, _ = _curve_axes(lines, "latent steps K", "milliseconds per call")
    for line in lines:
        _draw(area, line, lambda figure: figure.seconds * 1e3, "batch {}")
    _legend(area)
    return picture


def _curve_axes(lines: Sequence[Curve], along: str, value: str) -> tuple[Any, Any, list[int]]:
    """Axes for curves, and the numbers that they run along."""
    from matplotlib.ticker import FixedLocator

    picture, area = _axes(6.6, 4.4)
    numbers = sorted({at for line in lines for at, _ in line.points})
    area.set_yscale("log")
    _logarithmic(area.yaxis)
    area.xaxis.set_major_locator(FixedLocator(numbers))
    area.set_xlabel(along)
    area.set_ylabel(value)
    return picture, area, numbers


def _draw(area: Any, line: Curve, value: Callable[[Figure], float], held: str) -> None:
    ours = line.role == "ours"
    area.plot(
        [at for at, _ in line.points], [value(figure) for _, figure in line.points],
        _LINES[line.rank], color=_COLOURS[line.role], marker=_MARKERS[line.role], markersize=5,
        linewidth=2.2 if ours else 1.4, zorder=3 if ours else 2,
        label=line.engine if line.held is None else f"{line.engine}, {held.format(line.held)}",
    )  # fmt: skip


def _speed_up_plot(rows: Sequence[SpeedUp]) -> Any:
    """A mark for the reference and one for the best rival per case, on a logarithmic axis."""
    picture, area = _strip_axes([row.group for row in rows])
    for number, row in enumerate(rows):
        ends = [ratio for ratio in (row.reference, row.rival) if ratio is not None]
        area.plot([1, *ends], [number] * (1 + len(ends)), color=_FAINT, linewidth=1.5, zorder=1)
        area.annotate(
            " / ".join(_times(end) for end in ends), (max(*ends, 1.0), number), (7, 0),
            textcoords="offset points", va="center", fontsize=7, color=_INK,
        )  # fmt: skip
    for role, label in _OTHERS.items():
        marks = [(value, n) for n, row in enumerate(rows) if (value := getattr(row, role))]
        if marks:
            area.scatter(
                *zip(*marks, strict=True), s=32, zorder=3, color=_COLOURS[role],
                marker=_MARKERS[role], label=label,
            )  # fmt: skip
    area.axvline(1, color=_INK, linewidth=1)
    area.set_xscale("log")
    left, right = area.get_xlim()
    area.set_xlim(min(left, 0.9), right * 1.4)
    _logarithmic(area.xaxis, "×")
    area.set_xlabel("this package is faster by (left of 1×: slower)")
    _legend(area)
    return picture


def _times(ratio: float) -> str:
    """Two decimals near 1, where they matter."""
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}×"


def _roofline_plot(figures: Sequence[Figure]) -> Any:
    """Bars for this package's share of the floor, marks for the others in the same group."""
    rows = groups(figures)
    picture, area = _strip_axes([*rows])
    for number, members in enumerate(rows.values()):
        mine = best(members, "ours")
        share = 100 * ((mine and mine.of_floor) or 0.0)
        area.barh(
            number, share, height=0.6, color=_COLOURS["ours"], alpha=0.6, label=_NAMES["ours"]
        )
        for other in (figure for figure in members if figure.role != "ours" and figure.of_floor):
            area.scatter(
                100 * (other.of_floor or 0), number, s=30, color=_COLOURS[other.role],
                marker=_MARKERS[other.role], edgecolor="white", linewidth=0.6, zorder=3,
                label=_NAMES[other.role],
            )  # fmt: skip
        area.text(
            1.01, number, f"{share:.0f} %", transform=area.get_yaxis_transform(), va="center",
            fontsize=8, color=_COLOURS["ours"],
        )  # fmt: skip
    area.set_xlim(0, max(100.0, area.get_xlim()[1]) * 1.02)
    area.axvline(100, color=_INK, linewidth=1)
    area.set_xlabel("share of the roofline in %: least possible time over measured time")
    _legend(area)
    return picture


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches that belongs to no window, and its quiet axes."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(width, height), layout="constrained")
    area = picture.add_subplot()
    area.spines[["top", "right"]].set_visible(False)
    area.grid(True, which="major", color="#e5e7eb", linewidth=0.8)
    area.set_axisbelow(True)
    return picture, area


def _strip_axes(names: Sequence[str]) -> tuple[Any, Any]:
    """Axes with one line of the page per case."""
    picture, area = _axes(9.0, 1.1 + 0.27 * len(names))
    area.set_yticks(range(len(names)), names, fontsize=8)
    area.set_ylim(len(names) - 0.4, -0.6)
    area.grid(False, axis="y")
    area.tick_params(axis="y", length=0)
    return picture, area


def _legend(area: Any) -> None:
    """Above the axes, where it hides nothing; each label once."""
    handles, labels = area.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    area.legend(
        unique.values(), unique.keys(), loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2,
        frameon=False, fontsize=8, borderaxespad=0.2,
    )  # fmt: skip


def _logarithmic(axis: Any, unit: str = "") -> None:
    """Plain numbers at 1, 2 and 5 of each decade instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}{unit}"))
    axis.set_minor_formatter(NullFormatter())
