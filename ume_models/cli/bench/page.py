"""Tables and plots as one HTML page that needs no other file and no address."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ume_models.cli.bench.plots import Plot
from ume_models.cli.bench.tables import Table


@dataclass(frozen=True)
class Part:
    """What one file of results gives: its name, origin, tables and plots."""

    name: str
    origin: str
    tables: Sequence[Table]
    plots: Sequence[Plot]


def render_page(parts: Sequence[Part]) -> str:
    """The page; plots are inside it, texts are escaped."""
    environment = Environment(
        loader=PackageLoader("ume_models.cli.bench"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html").render(parts=parts)


def _data_uri(svg: str) -> str:
    # As a picture of its own, so that ids inside of two plots do not meet.
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
