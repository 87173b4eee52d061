"""The gallery page: self-contained, escaped, each picture once."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ume_models.retrieval.gallery import (
    Card,
    Found,
    Gallery,
    QueryBlock,
    Section,
    render_gallery,
)

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Structure(HTMLParser):
    """Checks that tags are balanced and collects what is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (600, 300), "red").save(path)
    return path


def gallery(*cards: Card, query: Card | None = None) -> Gallery:
    found = [Found(card, 0.5, relevant=number == 0) for number, card in enumerate(cards)]
    block = QueryBlock(query or Card("q", "a query"), found, "first match: rank 1", True)
    return Gallery("A title", "A lead", [Section("Section", [block], [("hit@1", "1.00")])])


def test_pictures_are_inside_and_stored_once(red: Path) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("blue", "green", "blue")]
    page = render_gallery(
        gallery(Card("one", images=[red]), Card("two", images=[red]), Card("three", video=frames))
    )
    structure = parse(page)
    data = [address for address in structure.addresses if address.startswith("data:")]
    assert len(data) == 3  # red, blue, green
    names = {address for address in structure.addresses if address.startswith("#p")}
    assert names == {"#p0", "#p1", "#p2"}
    assert {name.removeprefix("#") for name in names} <= set(structure.ids)
    assert all(address.startswith(("data:", "#")) for address in structure.addresses)
    assert not re.search(r"https?://|url\(|@import", page)
    image = Image.open(io.BytesIO(base64.b64decode(data[0].partition(",")[2])))
    assert image.size == (224, 112)
    assert image.convert("RGB").getpixel((100, 50))[0] > 200


def test_texts_are_escaped(red: Path) -> None:
    evil = '"><script>alert(1)</script>&'
    page = render_gallery(
        gallery(Card(evil, evil, images=[red]), query=Card(evil, evil)), max_side=32
    )
    structure = parse(page)
    assert "<script" not in page
    assert "".join(structure.text).count(evil) >= 4


def test_a_missing_picture_is_replaced_by_the_reason(tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG nonsense")
    page = render_gallery(gallery(Card("a", images=[tmp_path / "gone.png", torn])))
    text = "".join(parse(page).text)
    assert "gone.png" in text
    assert "does not exist" in text
    assert "torn.png" in text


def test_matches_are_told_in_words_too(red: Path) -> None:
    page = render_gallery(gallery(Card("a", images=[red]), Card("b", "wrong")))
    text = " ".join(" ".join(parse(page).text).split())
    assert text.count("✓ match") == 1
    assert "first match: rank 1" in text
    assert "hit@1 1.00" in text
