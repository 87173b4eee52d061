"""MMEB-V1: rows as TIGER-Lab/MMEB-eval has them, and what becomes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.mmeb_v1 import MMEB_V1
from ume_models.mmeb.readers import read_task

PICTURE = "<|image_1|>\nRepresent the given image."
TASKS = {task.name: task for task in MMEB_V1}


def row(
    text: str, path: str | None, texts: Sequence[str] | None, paths: Sequence[str] | None
) -> dict[str, Any]:
    return {"qry_text": text, "qry_img_path": path, "tgt_text": texts, "tgt_img_path": paths}


def write(root: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    file = root / "MMEB-eval" / name / "test.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(root: Path, name: str, **options: Any) -> TaskData:
    return read_task(TASKS[name], root, ReadOptions(**options))


def test_the_tasks_are_those_of_the_benchmark() -> None:
    assert Counter(task.group for task in MMEB_V1) == {
        "I-CLS": 10, "I-QA": 10, "I-RET": 12, "I-VG": 4
    }  # fmt: skip
    assert {(task.benchmark, task.ranking, task.metric) for task in MMEB_V1} == {
        ("MMEB-v1", "local", "hit@1")
    }


def test_texts_are_ranked_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "MMEB-eval/eval_images").mkdir(parents=True)
    question = "<|image_1|>\nRepresent the given image with the following question: what? \n"
    write(
        tmp_path,
        "OK-VQA",
        [
            row(question, "OK-VQA/1.jpg", ["cat", "dog", "cow", "dog"], ["", "", "", ""]),
            row(question, "OK-VQA/2.jpg", ["cow", "ox"], ["", ""]),
        ],
    )
    data = read(tmp_path, "OK-VQA")
    first, second = data.queries
    assert first.item.text == "Represent the given image with the following question: what?"
    assert first.item.images == (tmp_path / "MMEB-eval/eval_images/OK-VQA/1.jpg",)
    assert first.relevant == first.labels == ("cat",)
    assert first.candidates == ("cat", "dog", "cow", "dog")
    assert (second.relevant, second.candidates) == (("cow",), ("cow", "ox"))
    assert [query.item.id for query in data.queries] == ["0", "1"]
    assert list(data.candidates.names) == ["cat", "dog", "cow", "ox"]
    assert [data.candidates.item(n).text for n in range(4)] == ["cat", "dog", "cow", "ox"]
    assert all(not data.candidates.item(n).images for n in range(4))
    assert not data.candidates.clashes


def test_pictures_are_ranked_for_a_text(tmp_path: Path) -> None:
    write(
        tmp_path, "MSCOCO_t2i", [row("Find me: a dog \n", "", [PICTURE] * 2, ["a/1.jpg", "2.jpg"])]
    )
    data = read(tmp_path, "MSCOCO_t2i")
    assert data.queries[0].item.images == ()
    assert data.queries[0].item.text == "Find me: a dog"
    assert data.queries[0].relevant == ("a/1.jpg:Represent the given image.",)
    item = data.candidates.item(1)
    assert item.text == "Represent the given image."
    # Where no folder of pictures is there, the first place is named when one is missed.
    assert item.images == (tmp_path / "MMEB-eval/eval_images/2.jpg",)


def test_a_picture_with_several_texts_is_several_candidates(tmp_path: Path) -> None:
    texts = ["<|image_1|>\nThe left one", "<|image_1|>\nThe right one"]
    write(tmp_path, "RefCOCO-Matching", [row("<|image_1|> which?", "1.jpg", texts, ["1.jpg"] * 2)])
    data = read(tmp_path, "RefCOCO-Matching")
    assert list(data.candidates.names) == ["1.jpg:The left one", "1.jpg:The right one"]
    assert data.queries[0].candidates == tuple(data.candidates.names)
    assert data.queries[0].relevant == ("1.jpg:The left one",)


@pytest.mark.parametrize(
    "folder", ["MMEB-eval/images", "eval_images", "image-tasks/MMEB", "image-tasks"]
)
def test_places_of_the_pictures(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    write(tmp_path, "CIRR", [row(PICTURE, "CIRR/1.jpg", [PICTURE], ["CIRR/2.jpg"])])
    data = read(tmp_path, "CIRR")
    assert data.queries[0].item.images == (tmp_path / folder / "CIRR/1.jpg",)
    assert data.candidates.item(0).images == (tmp_path / folder / "CIRR/2.jpg",)


def test_a_limit_keeps_all_candidates(tmp_path: Path) -> None:
    write(tmp_path, "GQA", [row("?", "", [f"right {n}", "wrong"], ["", ""]) for n in range(4)])
    data = read(tmp_path, "GQA", limit=1)
    assert len(data.queries) == 1
    assert list(data.candidates.names) == ["right 0", "wrong", "right 1", "right 2", "right 3"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            row("?", "", ["a", "b"], [""]),
            "row 1: 'tgt_text' has 2 entries and 'tgt_img_path' has 1",
        ),
        (row(PICTURE, "", ["a"], [""]), "row 1: column 'qry_img_path' is empty"),
        (row(PICTURE, None, ["a"], [""]), "row 1: column 'qry_img_path' is empty"),
        (row("?", "", [PICTURE], [""]), "row 1: path 0 of 'tgt_img_path' is empty"),
        (row("?", "\0", ["a"], [""]), "row 1: column 'qry_img_path' holds a NUL"),
        (row("?", "", [], []), "row 1: column 'tgt_text' has an empty list"),
        (row("?", "", "a", [""]), "row 1: column 'tgt_text' must hold lists"),  # type: ignore[arg-type]
        (row("?", "", None, [""]), "row 1: column 'tgt_text' must hold lists"),
    ],
)
def test_rows_in_another_layout_are_named(
    bad: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, "GQA", [row("?", "", ["a"], [""]), bad])
    with pytest.raises(DataError, match=rf"^GQA: .*test.jsonl, {message}"):
        read(tmp_path, "GQA")


def test_missing_tables_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"GQA: .*TIGER-Lab/MMEB-eval"):
        read(tmp_path, "GQA")
    write(tmp_path, "GQA", [{"qry_text": "?", "qry_img_path": ""}])
    with pytest.raises(DataError, match="no column 'tgt_text', 'tgt_img_path'"):
        read(tmp_path, "GQA")
