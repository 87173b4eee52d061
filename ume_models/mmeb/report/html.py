"""How the pages are made: one file each, without scripts, pictures inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ume_models.mmeb.report import numbers
from ume_models.mmeb.summary import Mean
from ume_models.retrieval.gallery import Card, Gallery
from ume_models.retrieval.thumbnails import Thumbnail, Thumbnails


def render_page(
    body: str,
    context: Mapping[str, Any],
    *,
    title: str,
    eyebrow: str,
    heading: str,
    lead: str,
    max_side: int = 192,
) -> str:
    """A page as HTML without any reference to another file or address; texts are escaped.

    Args:
        body: name of the template of what is below the heading.
        context: its variables.
        title: of the browser's window.
        eyebrow: a line above the heading.
        heading: the heading.
        lead: one or two sentences below it.
        max_side: longer side of pictures in pixels.
    """
    pictures = Thumbnails(max_side)

    def images_of(card: Card) -> tuple[Thumbnail, ...]:
        return pictures.add_all(card.images)

    def frames_of(card: Card) -> tuple[Thumbnail, ...]:
        return pictures.add_all(card.video)

    environment = _environment()
    # The body first: rendering it collects the pictures that the page then defines once. Of the
    # gallery's own template only its macros are wanted, so it is given a gallery without content.
    inside = environment.get_template(body).render(
        **context, gallery=Gallery("", "", []), images_of=images_of, frames_of=frames_of
    )
    return environment.get_template("frame.html").render(
        title=title,
        eyebrow=eyebrow,
        heading=heading,
        lead=lead,
        body=inside,
        pictures=pictures.pictures,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("ume_models.mmeb.report"), PackageLoader("ume_models.retrieval")]
        ),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = (
        numbers.has_width,
        numbers.points,
        numbers.interval,
        numbers.signed,
        numbers.signed_interval,
        numbers.count,
        numbers.probability,
        numbers.similarity,
    )
    environment.filters.update({function.__name__: function for function in written})
    environment.filters.update(
        {
            "breakable": _breakable,
            "counted": numbers.plural,
            "percent": _percent,
            "product": _product,
            "share": _share,
            "tasks": _tasks,
            "tau": numbers.correlation,
        }
    )
    return environment


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore, and nowhere else."""
    return Markup("_<wbr>").join(name.split("_"))


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, from 0 to 1."""
    return (value - low) / (high - low)


def _percent(share: float) -> str:
    """A share as percents of a length, kept inside of it."""
    return f"{100 * max(0.0, min(1.0, share)):.2f}"


def _product(value: float) -> str:
    """An inner product with three digits; nothing where it is unknown."""
    return "" if math.isnan(value) else f"{value:.3f}"


def _tasks(mean: Mean) -> str:
    """How many tasks a mean is over, such as "16 of 18 tasks"."""
    noun = "task" if mean.of == 1 else "tasks"
    return f"{numbers.ran(mean.tasks, mean.of)} {noun}"
