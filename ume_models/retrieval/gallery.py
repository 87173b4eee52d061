"""A page that shows queries with what was found for them: one HTML file, pictures inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ume_models.processing.items import MediaSource
from ume_models.retrieval.thumbnails import Thumbnail, Thumbnails


@dataclass(frozen=True)
class Card:
    """An item as it is shown.

    Attributes:
        id: the item's id.
        text: its text, possibly empty.
        images: its still images.
        video: its frames, shown as a strip.
    """

    id: str
    text: str = ""
    images: Sequence[MediaSource] = ()
    video: Sequence[MediaSource] = ()


@dataclass(frozen=True)
class Found:
    """One result of a query.

    Attributes:
        card: the candidate.
        score: its inner product with the query.
        relevant: whether it answers the query; None where that is not known.
    """

    card: Card
    score: float
    relevant: bool | None = None


@dataclass(frozen=True)
class QueryBlock:
    """A query and its results, best first.

    Attributes:
        query: the query.
        found: its results.
        note: a remark below the query, such as the rank of the first match.
        answered: whether the best result is relevant; None where that is not known.
    """

    query: Card
    found: Sequence[Found]
    note: str = ""
    answered: bool | None = None


@dataclass(frozen=True)
class Section:
    """Queries of one kind.

    Attributes:
        title: heading.
        facts: pairs of a name and a value, such as measures of quality.
        blocks: the queries.
    """

    title: str
    blocks: Sequence[QueryBlock]
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Gallery:
    """The whole page.

    Attributes:
        title: heading of the page.
        lead: one or two sentences below it.
        remarks: lines about how the results were made.
        sections: the groups of queries.
        facts: pairs of a name and a value for the page as a whole.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()


def render_gallery(gallery: Gallery, max_side: int = 224) -> str:
    """The page as HTML without any reference to another file or address.

    Pictures that cannot be read are replaced by the reason. Texts are escaped.

    Args:
        gallery: what to show.
        max_side: longer side of the pictures in pixels.
    """
    pictures = Thumbnails(max_side)

    def images_of(card: Card) -> tuple[Thumbnail, ...]:
        return pictures.add_all(card.images)

    def frames_of(card: Card) -> tuple[Thumbnail, ...]:
        return pictures.add_all(card.video)

    environment = Environment(
        loader=PackageLoader("ume_models.retrieval"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The body first: rendering it collects the pictures that the page then defines once.
    body = environment.get_template("gallery_body.html").render(
        gallery=gallery, images_of=images_of, frames_of=frames_of
    )
    return environment.get_template("gallery.html").render(
        title=gallery.title, body=body, pictures=pictures.pictures
    )
