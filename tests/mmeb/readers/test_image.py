"""Image tasks: every string as the official evaluation writes it, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ume_models.errors import DataError

V1 = "<|image_1|>"


def row(**cells: Any) -> dict[str, Any]:
    empty = {"qry_inst": "", "qry_text": "", "qry_img_path": "", "tgt_inst": "", "tgt_text": [""]}
    return {**empty, "tgt_img_path": [""], **cells}


@pytest.mark.parametrize("task", ["ImageNet-1K", "MSCOCO_i2t"])
def test_a_picture_and_texts_to_rank(root: Any, task: str) -> None:
    root.table(
        f"image-tasks/{task}/test.jsonl",
        [
            row(
                qry_inst=f"{V1}\nRepresent the given image for classification \nplease",
                qry_img_path="imgs/a.jpg",
                tgt_text=["cat", "dog"],
            ),
            row(
                qry_inst=f"{V1} Caption:", qry_text="a text", qry_img_path="imgs/b.jpg",
                tgt_text=["bird", "cat", "cat"],
            ),
        ],
    )  # fmt: skip
    data = root.read(task)
    media = root.path / "image-tasks"
    # The placeholder goes, " \n" becomes "\n", one line break ends the text.
    assert [query.item.text for query in data.queries] == [
        "\nRepresent the given image for classification\nplease\n",
        " Caption: a text\n",
    ]
    assert [query.item.images for query in data.queries] == [
        (media / "imgs/a.jpg",), (media / "imgs/b.jpg",),
    ]  # fmt: skip
    assert [query.relevant for query in data.queries] == [("cat",), ("bird",)]
    assert data.queries[0].candidates == ("cat", "dog")
    assert data.queries[1].candidates == ("bird", "cat", "cat")
    assert [query.item.id for query in data.queries] == ["0", "1"]
    assert list(data.candidates.names) == ["cat", "dog", "bird"]
    first = data.candidates.item(0)
    assert (first.text, first.images, first.video, first.id) == ("cat", (), None, "cat")
    assert data.queries[0].grades is None


def test_questions_stand_on_a_line_of_their_own(root: Any) -> None:
    inst = f"{V1}\nRepresent the given image with the following question: "
    root.table(
        "image-tasks/OK-VQA/test.jsonl",
        [row(qry_inst=inst, qry_text="What is it?", qry_img_path="a.png", tgt_text=["yes", "no"])],
    )
    query = root.read("OK-VQA").queries[0]
    expected = "\nRepresent the given image with the following question: What is it?\n"
    assert query.item.text == expected


@pytest.mark.parametrize(("task", "end"), [("MSCOCO_t2i", "\n"), ("VisDial", "\n\n")])
def test_texts_that_look_for_pictures(root: Any, task: str, end: str) -> None:
    root.files("image-tasks/MMEB")
    root.table(
        f"image-tasks/{task}/test.jsonl",
        [
            row(
                qry_inst="Find me an image.", qry_text="Two dogs \nplay ", tgt_text=["", ""],
                tgt_inst=f"{V1} \nRepresent the given image.", tgt_img_path=["b.jpg", "a.jpg"],
            )
        ],
    )  # fmt: skip
    data = root.read(task)
    query = data.queries[0]
    assert query.item.text == f"Find me an image. Two dogs \nplay {end}"  # spaces stay here
    assert query.item.images == () and query.item.video is None
    assert (query.relevant, query.candidates) == (("b.jpg",), ("b.jpg", "a.jpg"))
    second = data.candidates.item(1)
    assert second.text == "\nRepresent the given image.\n"
    assert second.images == (root.path / "image-tasks/MMEB/a.jpg",)


def test_candidates_with_captions(root: Any) -> None:
    root.table(
        "image-tasks/WebQA/test.jsonl",
        [
            row(
                qry_inst="Find it.", qry_text="Who?", tgt_text=["First \nline", "second"],
                tgt_inst=f"{V1}\nRepresent this:", tgt_img_path=["a.jpg", "b.jpg"],
            ),
            row(
                qry_inst="Find it.", qry_text="When?", tgt_text=["another caption", "second"],
                tgt_inst=f"{V1}\nRepresent this:", tgt_img_path=["a.jpg", "b.jpg"],
            ),
        ],
    )  # fmt: skip
    data = root.read("WebQA")
    texts = [data.candidates.item(place).text for place in range(2)]
    assert texts == ["\nRepresent this: First\nline\n", "\nRepresent this: second\n"]
    # A name that comes with another caption later keeps the first one, and is told.
    assert list(data.candidates.names) == ["a.jpg", "b.jpg"]
    assert list(data.candidates.clashes) == ["a.jpg"]


def test_regions_are_told_apart_by_their_captions(root: Any) -> None:
    root.table(
        "image-tasks/RefCOCO-Matching/test.jsonl",
        [
            row(
                qry_inst=f"{V1} Select the portion ", qry_text='"left dog"', qry_img_path="q.jpg",
                tgt_inst=f"{V1}\nSelect:", tgt_text=['"left dog"', '"right dog"'],
                tgt_img_path=["t.jpg", "t.jpg"],
            )
        ],
    )  # fmt: skip
    data = root.read("RefCOCO-Matching")
    assert list(data.candidates.names) == ["t.jpg:left dog", "t.jpg:right dog"]
    assert data.queries[0].relevant == ("t.jpg:left dog",)
    assert data.queries[0].item.text == '\nSelect the portion "left dog"\n'
    assert data.candidates.item(1).text == '\nSelect: "right dog"\n'


def test_regions_without_captions_have_no_line_break_at_the_end(root: Any) -> None:
    root.table(
        "image-tasks/NIGHTS/test.jsonl",
        [
            row(
                qry_inst=f"{V1}\nFind a similar image.", qry_img_path="q.jpg", tgt_text=[" ", ""],
                tgt_inst=f"{V1}\nRepresent the image.", tgt_img_path=["a.jpg", "b.jpg"],
            )
        ],
    )  # fmt: skip
    data = root.read("NIGHTS")
    assert data.candidates.item(0).text == "\nRepresent the image."
    assert list(data.candidates.names) == ["a.jpg: ", "b.jpg:"]
    assert data.queries[0].item.text == "\nFind a similar image.\n"


def test_a_limit_takes_queries_and_leaves_candidates(root: Any) -> None:
    rows = [row(qry_img_path=f"{n}.jpg", tgt_text=[f"c{n}"]) for n in range(5)]
    root.table("image-tasks/VOC2007/test.jsonl", rows)
    data = root.read("VOC2007", limit=2)
    assert [query.relevant for query in data.queries] == [("c0",), ("c1",)]
    assert list(data.candidates.names) == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        ("VOC2007", {"qry_img_path": None}, "row 1: column 'qry_img_path' is empty"),
        ("GQA", {"qry_img_path": ""}, "row 1: column 'qry_img_path' is empty"),
        ("CIRR", {"qry_img_path": None}, "row 1: column 'qry_img_path' is empty"),
        ("CIRR", {"qry_img_path": "a\0.jpg"}, "row 1: column 'qry_img_path' holds a NUL"),
        ("WebQA", {"tgt_img_path": [""]}, "row 1: path 0 of 'tgt_img_path' is empty"),
        ("WebQA", {"tgt_img_path": ["\0"]}, "row 1: column 'tgt_img_path' holds a NUL"),
        ("WebQA", {"qry_text": None}, "row 1: column 'qry_text' is empty"),
        ("WebQA", {"qry_text": "\ud83d"}, r"row 1: column 'qry_text' holds half a character"),
        ("VOC2007", {"tgt_text": ["a", "\udc00"]}, "row 1: column 'tgt_text' holds half"),
        ("VOC2007", {"tgt_text": []}, "row 1: column 'tgt_text' has an empty list"),
        ("VOC2007", {"tgt_text": "cat"}, "row 1: column 'tgt_text' must hold lists"),
        ("VOC2007", {"qry_text": 3}, "row 1: column 'qry_text' holds int"),
        ("CIRR", {"tgt_img_path": ["a", "b"]}, "they are pairs"),
        ("WebQA", {"tgt_text": ["a"], "tgt_img_path": ["a", "b"]}, "they are pairs"),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    root: Any, task: str, cells: dict[str, Any], message: str
) -> None:
    good = {"qry_img_path": "q.jpg", "tgt_img_path": ["t.jpg"]}
    rows = [row(**good), row(**{**good, **cells})]
    table = root.table(f"image-tasks/{task}/test.jsonl", rows)
    with pytest.raises(DataError, match=rf"^{task}: .*{message}.*; get the table again$") as caught:
        root.read(task)
    assert str(table) in str(caught.value)


def test_a_missing_column_is_named(root: Any) -> None:
    root.table("image-tasks/VOC2007/test.jsonl", [{"qry_inst": "", "tgt_text": ["a"]}])
    with pytest.raises(DataError, match="has no column 'qry_text', 'qry_img_path'"):
        root.read("VOC2007")
