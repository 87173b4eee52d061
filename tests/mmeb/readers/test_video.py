"""Videos: classes, choices, captions and questions, with the official strings written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ume_models.errors import DataError
from ume_models.mmeb.frames import missing_frames
from ume_models.mmeb.readers.video_classes import class_names
from ume_models.mmeb.readers.video_questions import MVBENCH_SUBSETS

QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
FRAMES = "video-tasks/frames"
TABLES = {
    "Breakfast": "video-tasks/Breakfast/test.jsonl",
    "SmthSmthV2": "video-tasks/SmthSmthV2/test.jsonl",
    "MSR-VTT": "video-tasks/MSR-VTT/test_1k/test.jsonl",
    "MSVD": "video-tasks/MSVD/data/test.jsonl",
    "EgoSchema": "video-tasks/EgoSchema/Subset/test.jsonl",
}


@pytest.mark.parametrize(
    ("task", "count", "first", "last"),
    [
        ("HMDB51", 51, "ride_bike", None),
        ("UCF101", 101, "Kayaking", None),
        ("K700", 700, "waiting_in_line", "clay_pottery_making"),
        ("Breakfast", 10, "pancake", "salad"),
    ],
)
def test_lists_of_classes(task: str, count: int, first: str, last: str | None) -> None:
    names = class_names(task)
    assert len({*names}) == len(names) == count
    assert names[0] == first and (last is None or names[-1] == last)


def test_all_classes_are_candidates(root: Any, names_of_video: Callable) -> None:
    root.table(
        "video-tasks/Breakfast/test.jsonl",
        [
            {"video_id": "P03_tea", "pos_text": "tea"},
            {"video_id": "P04_cake", "pos_text": "cake"},
            {"video_id": "P05_tea", "pos_text": "tea"},
        ],
    )
    root.files(f"{FRAMES}/video_cls/Breakfast/P03_tea", *(f"{n}.jpeg" for n in range(20)))
    root.files(f"{FRAMES}/video_cls/Breakfast/P04_cake", "frame_2.jpg", "frame_10.jpg", "notes.txt")
    data = root.read("Breakfast")
    text = "Recognize the breakfast type that the person is cooking in the video. "
    assert [query.item.text for query in data.queries] == [text] * 3
    assert [query.relevant for query in data.queries] == [("tea",), ("cake",), ("tea",)]
    assert data.queries[0].candidates == ()  # ranked among all
    # Labels of the rows first, then the list, where "tea" is not named again.
    assert list(data.candidates.names)[:4] == ["tea", "cake", "pancake", "cereal"]
    assert len(data.candidates) == 11
    assert data.candidates.item(2).text == "pancake"
    # Eight frames of twenty, the ends and evenly between; all where there are fewer.
    numbers = [0, 2, 5, 8, 10, 13, 16, 19]
    assert names_of_video(data.queries[0].item) == [f"{n}.jpeg" for n in numbers]
    assert names_of_video(data.queries[1].item) == ["frame_2.jpg", "frame_10.jpg"]
    # A video without frames stops nothing here; embedding it names the folder.
    folder = root.path / FRAMES / "video_cls/Breakfast/P05_tea"
    assert data.queries[2].item.video == (folder,)
    assert [missing_frames(query.item) for query in data.queries] == [None, None, folder]


def test_choices_of_each_row(root: Any) -> None:
    rows = [
        {"video_id": n, "pos_text": "Closing something", "neg_text": ["Opening", f"Choice {n}"]}
        for n in range(1003)
    ]
    root.table("video-tasks/SmthSmthV2/test.jsonl", rows)
    data = root.read("SmthSmthV2")
    assert len(data.queries) == 1000  # as the official configuration has it
    assert len(data.candidates) == 1001
    query = data.queries[7]
    assert query.candidates == ("Opening", "Choice 7")
    assert query.relevant == ("Closing something",)  # not among its choices: kept as published
    assert query.item.video == (root.path / FRAMES / "video_cls/SSv2/7",)


@pytest.mark.parametrize(
    ("task", "config", "split", "cells", "video", "caption", "instruction"),
    [
        ("MSR-VTT", "test_1k", "test", {"video_id": "video7", "video": "video7.mp4",
         "caption": "a cat"}, "video7", "a cat",
         "Find a video that contains the following visual content:"),
        ("MSVD", "", "test", {"video_id": "v_1", "video": "v_1.avi", "caption": ["one", "two"]},
         "v_1", "one", "Find the video snippet that corresponds to the given summary:"),
        ("DiDeMo", "", "test", {"video": "test/12@N0_3.4.mp4", "caption": "a man. then a dog."},
         "12@N0_3.4", "a man. then a dog.",
         "Find a video that includes the following described scenes:"),
        ("YouCook2", "", "val", {"id": "xyz_0", "video_path": "val/xyz.mp4", "sentence": "cut"},
         "xyz_0", "cut",
         "Find a video that demonstrates the following action while making a recipe:"),
        ("VATEX", "", "test", {"videoID": "abc_1_2", "enCap": ["first", "second"]}, "abc_1_2",
         "first", "Select a video that fits the description provided:"),
    ],
)  # fmt: skip
def test_captions_that_look_for_videos(
    root: Any, task: str, config: str, split: str, cells: dict[str, Any], video: str, caption: str,
    instruction: str, names_of_video: Callable,
) -> None:  # fmt: skip
    repository = f"video-tasks/{task}"
    root.table(f"{repository}/{config or 'data'}/{split}.jsonl", [cells, cells])
    root.files(f"{FRAMES}/video_ret/{task}/{video}", "1.jpg", "2.jpg")
    data = root.read(task)
    assert data.queries[0].item.text == f"{instruction} {caption}"
    assert data.queries[0].item.video is None
    assert [query.relevant for query in data.queries] == [(video,), (video,)]
    assert list(data.candidates.names) == [video]
    candidate = data.candidates.item(0)
    assert candidate.text == "Understand the content of the provided video."
    assert names_of_video(candidate) == ["1.jpg", "2.jpg"]


def test_video_mme(root: Any) -> None:
    options = ["A. Apples.", "B. Two. Three. ", "C. ...", "D"]
    root.table(
        "video-tasks/Video-MME/test.jsonl",
        [{"videoID": "vid", "question": "How many?", "options": options, "answer": "B"}],
    )
    data = root.read("Video-MME")
    query = data.queries[0]
    lines = "How many?\nA. Apples.\nB. Two. Three. \nC. ...\nD"
    assert query.item.text == f"{QUESTION} {lines}"  # two spaces, the prompt ends with one
    assert query.candidates == tuple(options) and query.relevant == ("B. Two. Three. ",)
    texts = [data.candidates.item(place).text for place in range(4)]
    assert texts == ["Apples", "Two. Three", "", "D"]


def test_nextqa(root: Any) -> None:
    cells = {"video": 4010069381, "question": "why", "answer": 3,
             "a0": "a", "a1": "b", "a2": "c", "a3": "d", "a4": "e "}  # fmt: skip
    root.table("video-tasks/NExTQA/MC/test.jsonl", [cells])
    query = root.read("NExTQA").queries[0]
    assert query.item.text == f"{QUESTION} why\nOptions:\n(A) a\n(B) b\n(C) c\n(D) d\n(E) e"
    assert (query.candidates, query.relevant) == (("a", "b", "c", "d", "e "), ("d",))
    assert query.item.video == (root.path / FRAMES / "video_qa/NExTQA/4010069381",)


def test_egoschema(root: Any) -> None:
    cells = {"video_idx": "u-1", "question": "What?", "answer": "1",
             "option": ["A. C sits.", "B. C stands up"]}  # fmt: skip
    root.table("video-tasks/EgoSchema/Subset/test.jsonl", [cells])
    data = root.read("EgoSchema")
    assert data.queries[0].item.text == f"{QUESTION} What?A. C sits. B. C stands up"
    assert data.queries[0].relevant == ("B. C stands up",)
    assert [data.candidates.item(place).text for place in (0, 1)] == ["C sits", "C stands up"]


def test_mvbench_joins_its_subsets(root: Any, names_of_video: Callable) -> None:
    for number, subset in enumerate(MVBENCH_SUBSETS):
        cells = {"video": f"{number}.mp4", "question": "Which?", "candidates": ["x", "y", "x"],
                 "answer": "xy"[number % 2]}  # fmt: skip
        root.table(f"video-tasks/MVBench/json/{subset}.jsonl", [cells])
    root.files(f"{FRAMES}/video_qa/MVBench/action_sequence/1.mp4", "00001.jpg")
    data = root.read("MVBench")
    assert len(data.queries) == len(data.files) == 20
    second = data.queries[1]
    assert second.item.text == f"{QUESTION} Which?\nOptions:\n(A) x\n(B) y\n(C) x"
    assert second.candidates == ("(A) x", "(B) y", "(C) x")
    assert second.relevant == ("(B) y",)
    assert data.queries[0].relevant == ("(C) x",)  # the last of equal choices
    assert names_of_video(second.item) == ["00001.jpg"]
    assert missing_frames(data.queries[2].item).name == "2.mp4"  # a folder, whatever its name


def test_activitynetqa(root: Any) -> None:
    cells = {"video_name": "abc", "question": "is it red", "answer": "no", "question_id": "q"}
    root.table("video-tasks/data/activitynetqa.jsonl", [cells])
    data = root.read("ActivityNetQA")
    query = data.queries[0]
    assert query.item.text == f"{QUESTION} is it red? (A) yes; (B) no."
    assert (query.candidates, query.relevant) == (("yes", "no"), ("no",))
    assert query.item.video == (root.path / FRAMES / "video_qa/ActivityNetQA/v_abc",)


@pytest.mark.parametrize(
    ("task", "path", "cells", "message"),
    [
        ("Video-MME", "Video-MME/test",
         {"videoID": "v", "question": "q", "options": ["A. a", "B. b"], "answer": "C"},
         "row 0: the answer 'C' is none of the 2 options"),
        ("EgoSchema", "EgoSchema/Subset/test",
         {"video_idx": "v", "question": "q", "option": ["A. a"], "answer": "1"},
         "row 0: the answer '1' is not a position among 1 options"),
        ("NExTQA", "NExTQA/MC/test",
         {"video": 1, "question": "q", "answer": "B", **dict.fromkeys(("a0", "a1", "a2", "a3",
          "a4"), "x")}, "the answer 'B' is not a position among 5"),
        ("ActivityNetQA", "ActivityNetQA/test",
         {"video_name": "v", "question": "q", "answer": "maybe"}, "neither 'yes' nor 'no'"),
        ("MSVD", "MSVD/test", {"video_id": "v", "caption": "one text"}, "must hold lists of texts"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_found_are_named(
    root: Any, task: str, path: str, cells: dict[str, Any], message: str
) -> None:
    root.table(f"video-tasks/{path}.jsonl", [cells])
    with pytest.raises(DataError, match=f"^{task}: .*{message}"):
        root.read(task)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("Breakfast", {"video_id": None, "pos_text": "tea"}),
        ("Breakfast", {"video_id": "a\0", "pos_text": "tea"}),
        ("Breakfast", {"video_id": "a", "pos_text": None}),
        ("SmthSmthV2", {"video_id": None, "pos_text": "a", "neg_text": ["a"]}),
        ("SmthSmthV2", {"video_id": 1, "pos_text": None, "neg_text": ["a"]}),
        ("MSR-VTT", {"video_id": None, "caption": "a"}),
        ("MSR-VTT", {"video_id": "a\0b", "caption": "a"}),
        ("MSR-VTT", {"video_id": "v", "caption": None}),
        ("MSVD", {"video_id": "v", "caption": None}),
        ("EgoSchema", {"video_idx": None, "question": "q", "option": ["A. a"], "answer": 0}),
        ("EgoSchema", {"video_idx": "v", "question": None, "option": ["A. a"], "answer": 0}),
        ("EgoSchema", {"video_idx": "v", "question": "q", "option": ["A"], "answer": float("inf")}),
        ("EgoSchema", {"video_idx": "v", "question": "q", "option": ["A"], "answer": 0.5}),
    ],
)
def test_cells_without_content_are_named(root: Any, task: str, row: dict[str, Any]) -> None:
    file = root.table(TABLES[task], [row])
    with pytest.raises(DataError, match=rf"^{task}: .*, row 0: .*get the table again$") as caught:
        root.read(task)
    assert str(file) in str(caught.value)


def test_mvbench_answers_are_among_the_candidates(root: Any) -> None:
    for subset in MVBENCH_SUBSETS:
        cells = {"video": "v", "question": "q", "candidates": ["x"], "answer": "z"}
        root.table(f"video-tasks/MVBench/{subset}/train.jsonl", [cells])
    with pytest.raises(DataError, match="'z' is none of the candidates"):
        root.read("MVBench")
