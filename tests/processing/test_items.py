from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ume_models.errors import ItemError
from ume_models.processing import Item, parse_item


def test_all_fields() -> None:
    item = parse_item({"text": "t", "image": b"x", "instruction": "i", "id": 7}, 3)
    assert item == Item(text="t", images=(b"x",), instruction="i", id="7")


def test_defaults_and_none_fields() -> None:
    item = parse_item({"text": "t", "image": None, "images": None, "video": None, "id": None}, 3)
    assert item == Item(text="t", id="3")


def test_relative_paths_follow_the_base_directory() -> None:
    item = parse_item({"images": ["a.png", Path("b.png"), "/abs/c.png"]}, 0, "/base")
    assert item.images == (Path("/base/a.png"), Path("/base/b.png"), Path("/abs/c.png"))


def test_video_keeps_the_order_and_kinds_of_frames() -> None:
    picture = Image.new("RGB", (4, 4))
    item = parse_item({"video": ["f0.png", bytearray(b"x"), picture]}, 0)
    assert item.video == (Path("f0.png"), b"x", picture)


def test_an_item_object_is_checked_too() -> None:
    assert parse_item(Item(text="t", images=("a.png",)), 5).id == "5"
    with pytest.raises(ItemError, match="empty"):
        parse_item(Item(), 0)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ("text", "expected a mapping"),
        ({"text": 1}, "'text' must be a string"),
        ({"text": "a", "instruction": ["x"]}, "'instruction' must be a string"),
        ({"txt": "a"}, "unknown field 'txt'; did you mean 'text'"),
        ({"text": "a", "label": 3}, "unknown field 'label'"),
        ({"image": "a.png", "images": ["a.png"]}, "both 'image' and 'images'"),
        ({"image": "a.png", "video": ["a.png"]}, "both images and a video"),
        ({"images": ["a.png"], "video": ["a.png"]}, "both images and a video"),
        ({"images": "a.png"}, "'images' must be a list"),
        ({"images": []}, "'images' is an empty list"),
        ({"image": ["a.png"]}, "use 'images'"),
        ({"image": 5}, "'image' must be a path, bytes or a PIL image, got int"),
        ({"image": ""}, "empty path"),
        ({"images": ["a.png", None]}, r"'images\[1\]' must be a path"),
        ({"video": []}, "'video' is an empty list"),
        ({"video": "clip.mp4"}, "extract the frames"),
        ({"image": "https://example.org/a.png"}, "https: address"),
        ({"image": "data:image;base64,AAAA"}, "data: address"),
        ({"text": "a\ud800"}, "surrogates"),
        ({"text": "a", "id": ""}, "'id' must be a non-empty"),
        ({"text": "a", "id": True}, "'id' must be a string or an integer, got bool"),
        ({}, "is empty"),
        ({"text": " \n", "instruction": ""}, "is empty"),
    ],
)
def test_bad_items(obj: Any, message: str) -> None:
    with pytest.raises(ItemError, match=message) as error:
        parse_item(obj, 4)
    assert error.value.index == 4
    assert str(error.value).startswith("item 4")


def test_errors_carry_the_given_id() -> None:
    with pytest.raises(ItemError, match=r"item 2 \(id 'q7'\)"):
        parse_item({"id": "q7"}, 2)


def test_empty_items_are_accepted_on_demand() -> None:
    assert parse_item({}, 0, allow_empty=True).is_empty
