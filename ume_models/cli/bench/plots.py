"""Which plots a file of results gives, drawn as PNG and SVG.

matplotlib is imported when something is drawn, so that tables need nothing but this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.atomic import replacing
from ume_models.cli.bench.curves import curves, latency, throughput
from ume_models.cli.bench.figures import Results
from ume_models.cli.bench.strips import roofline_plot, speed_up_plot, speed_ups

MISSING = "no plots, tables only: matplotlib is not installed; pip install matplotlib"

_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Plot:
    """A picture in ``NAME.png`` and ``NAME.svg``, and the content of the latter."""

    name: str
    title: str
    svg: str


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


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
    plots = []
    for stem, title, paint in _wanted(results):
        import matplotlib

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
        yield "speed-up", title, partial(speed_up_plot, compared)
    for section, figures in results.sections().items():
        stem = section.replace(" ", "-")
        over_batch = curves(figures, lambda f: f.batch, lambda f: f.steps)
        if over_batch:
            title = f"Throughput over batch: {section}"
            yield f"throughput-{stem}", title, partial(throughput, over_batch)
        over_steps = curves(figures, lambda f: f.steps, lambda f: f.batch)
        if over_steps:
            title = f"Time over latent steps: {section}"
            yield f"latency-{stem}", title, partial(latency, over_steps)
    bounded = [figure for figure in results.figures if figure.floor is not None]
    if bounded:
        yield "roofline", "Share of the roofline", partial(roofline_plot, bounded)
