"""Keys: equal content, equal key; anything else, another one."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from ume_models.mmeb.keys import ContentKeys, key_kind
from ume_models.mmeb.picture_check import PictureCheck
from ume_models.processing.items import Item


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number, colour in enumerate(("red", "blue", "red")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), colour).save(path)
        paths.append(path)
    return paths


def keys_of(tmp_path, *items: Item) -> list[str]:
    return ContentKeys(tmp_path / "media.json", tmp_path).keys(lambda i: items[i], len(items))


def test_a_pipe_is_no_picture_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    keys = ContentKeys(None, tmp_path)
    keys.keys(lambda _: Item(images=(tmp_path / "pipe.png",)), 1)
    assert keys.missing == [str(tmp_path / "pipe.png")]
    found = PictureCheck().wrong(tmp_path / "pipe.png", decode=True)
    assert found is not None and "is a pipe, socket or device" in found[1]


def test_content_counts_and_names_do_not(tmp_path, pictures):
    red, blue, copy = pictures
    items = [
        Item(text="a", images=(red,), id="1"),
        Item(text="a", images=(copy,), id="2"),
        Item(text="a", images=(red.read_bytes(),)),
        Item(text="a", images=(blue,)),
        Item(text="b", images=(red,)),
        Item(text="a", video=(red,)),
        Item(text="a", images=(red, blue)),
        Item(text="a", images=(blue, red)),
        Item(text="a"),
        Item(text="", instruction="a"),
    ]
    found = keys_of(tmp_path, *items)
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == len(found) - 2
    assert [key_kind(key) for key in found] == ["image"] * 5 + ["video"] + ["image"] * 2 + [
        "text"
    ] * 2


def test_a_changed_file_gets_another_key_and_an_unchanged_one_is_not_read_again(
    tmp_path, pictures, monkeypatch
):
    red = pictures[0]
    item = Item(images=(red,))
    keys = ContentKeys(tmp_path / "media.json", tmp_path)
    before = keys.keys(lambda _: item, 1)
    keys.save()
    assert list(json.loads((tmp_path / "media.json").read_text())["files"]) == ["0.png"]
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"{path} was read"))
        patch.setattr("ume_models.mmeb.keys._read_cache", lambda path: dict(keys._known))
        assert keys_of(tmp_path, item) == before
    Image.new("RGB", (4, 4), "green").save(red)
    os.utime(red, ns=(1, 1))
    assert keys_of(tmp_path, item) != before


def test_a_missing_file_is_told_and_keeps_its_items_apart(tmp_path):
    keys = ContentKeys(tmp_path / "media.json", tmp_path)
    items = [Item(images=(tmp_path / "a.png",)), Item(images=(tmp_path / "b.png",))]
    found = keys.keys(lambda i: items[i], 2)
    assert found[0] != found[1]
    assert sorted(keys.missing) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("1", "2")])
def test_a_damaged_cache_is_made_anew(tmp_path, pictures, damage):
    cache, items = tmp_path / "media.json", [Item(images=(path,)) for path in pictures]
    keys = ContentKeys(cache, tmp_path)
    before = keys.keys(lambda i: items[i], 3)
    keys.save()
    cache.write_text(damage(cache.read_text()))
    assert keys_of(tmp_path, *items) == before


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path):
    keys = ContentKeys(None, tmp_path)
    assert keys.keys(lambda _: Item(images=(tmp_path / "a\0b.png",)), 1)
    assert len(keys.missing) == 1
