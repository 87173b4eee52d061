"""What other libraries call an input becomes the item a user would have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ume_models.errors import ItemError
from ume_models.interfaces.inputs import as_image, make_item


def test_strings_are_texts_unless_paths_are_asked_for(image):
    assert make_item(image, 0).text == image
    found = make_item(image, 0, paths=True)
    assert found.images == (Path(image),) and found.text == ""
    for text in ("not/there.png", "see https://example.org/a.png", "a.png and b.png"):
        assert make_item(text, 0, paths=True).text == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://example.org/a.png", "download it"),
        ("https://example.org/a.mp4", "extract its frames"),
        ("data:image/png;base64,AAAA", "download it"),
    ],
)
def test_addresses_of_media_are_refused_with_the_way_to_mean_text(text, words):
    with pytest.raises(ItemError, match=words) as caught:
        make_item(text, 3, paths=True)
    assert caught.value.index == 3 and "{'text': …}" in str(caught.value)
    assert make_item({"text": text}, 3, paths=True).text == text


def test_prompt_goes_in_front_of_everything():
    assert make_item("a", 0, "P: ").text == "P: a"
    assert make_item(np.str_("a"), 0, "P: ").text == "P: a"
    both = make_item({"text": "a", "instruction": "i"}, 0, "P: ")
    assert (both.instruction, both.text) == ("P: i", "a")
    picture = Image.new("RGB", (28, 28))
    alone = make_item(picture, 0, "P: ")
    assert alone.images == (picture,) and alone.text == "P: "


def test_arrays_become_the_same_picture():
    pixels = np.arange(28 * 30 * 3, dtype=np.uint8).reshape(28, 30, 3)
    for value in (pixels, torch.from_numpy(pixels), pixels.transpose(2, 0, 1)):
        assert np.array_equal(np.asarray(as_image(value, 0)), pixels)
    frames = np.stack([pixels, 255 - pixels])
    found = make_item({"video": torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())}, 0)
    assert [np.array_equal(np.asarray(f), p) for f, p in zip(found.video, frames, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (("a", "b"), "is a list"),
        ({"role": "user", "content": "a"}, "chat message"),
        ({"audio": np.zeros(4), "text": "a"}, "audio"),
        (np.zeros((28, 28, 3)), "uint8"),
        ({"txt": "a"}, "did you mean 'text'"),
        (3, "expected a mapping"),
    ],
)
def test_bad_inputs_name_the_item_and_the_remedy(value, words):
    with pytest.raises(ItemError, match=words) as caught:
        make_item(value, 5)
    assert caught.value.index == 5
