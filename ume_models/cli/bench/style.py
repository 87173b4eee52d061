"""How plots look: one colour and marker per role, quiet axes. matplotlib is imported when used."""

from __future__ import annotations

from typing import Any

from ume_models.cli.bench.figures import Role

COLOURS: dict[Role, str] = {
    "ours": "#1f5fbf", "reference": "#6b7280", "rival": "#d97706", "ablation": "#7e57c2",
}  # fmt: skip
MARKERS: dict[Role, str] = {"ours": "o", "reference": "s", "rival": "^", "ablation": "D"}
NAMES: dict[Role, str] = {
    "ours": "this package", "reference": "reference path", "rival": "rivals",
    "ablation": "this package without a part",
}  # fmt: skip
INK, FAINT = "#374151", "#d1d5db"


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches that belongs to no window, and its axes."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    area = picture.add_subplot()
    for side in ("top", "right"):
        area.spines[side].set_visible(False)
    area.grid(True, which="major", color="#e5e7eb", linewidth=0.8)
    area.set_axisbelow(True)
    return picture, area


def legend(area: Any) -> None:
    """Above the axes, where it hides nothing; each label once."""
    handles, labels = area.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    area.legend(
        unique.values(), unique.keys(), loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2,
        frameon=False, fontsize=8, borderaxespad=0.2,
    )  # fmt: skip


def logarithmic(axis: Any, unit: str = "") -> None:
    """Plain numbers at 1, 2 and 5 of each decade instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}{unit}"))
    axis.set_minor_formatter(NullFormatter())
