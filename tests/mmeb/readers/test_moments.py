"""Moment retrieval: folders of clips, and MomentSeeker in both of its published layouts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ume_models.errors import DataError

CLIP = "Understand the content of the provided video clip."


def test_clips_are_folders_beside_the_query(root: Any) -> None:
    frames = "video-tasks/frames/video_mret/Charades_STA/AB12"
    for folder in ("query", "positive", "negative_10", "negative_2"):
        root.files(f"{frames}/{folder}", "0.jpg", "1.jpg")
    root.files(frames, "info.json")
    rows = [{"query": "person sits.", "video_path": "some/where/AB12.mp4"}]
    root.table("video-tasks/data/charades_sta.jsonl", rows * 2)
    data = root.read("Charades-STA")
    query = data.queries[1]
    assert query.item.text == (
        "Find the clip that corresponds to the described scene in the given video: person sits."
    )
    assert query.item.video == tuple(root.path / frames / "query" / f"{n}.jpg" for n in (0, 1))
    assert query.candidates == ("AB12/negative_10", "AB12/negative_2", "AB12/positive")
    assert query.relevant == ("AB12/positive",)
    assert list(data.candidates.names) == list(query.candidates)
    clip = data.candidates.item(2)
    assert clip.text == "Understand the content of the provided video."
    assert clip.video == tuple(root.path / frames / "positive" / f"{n}.jpg" for n in (0, 1))


def test_videos_without_clips_are_named(root: Any) -> None:
    frames = "video-tasks/frames/video_mret/QVHighlight"
    root.files(f"{frames}/there/positive_1", "0.jpg")
    root.files(f"{frames}/unlabelled/negative_1", "0.jpg")
    names = ("there", "unlabelled", "gone", "gone")
    rows = [{"query": "q", "video_path": f"{name}.mp4"} for name in names]
    root.table("video-tasks/QVHighlight/test.jsonl", rows)
    with pytest.raises(DataError, match=r"2 videos have no folder.*: unlabelled, gone; extract"):
        root.read("QVHighlight")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"query": None}, "column 'query' is empty"),
        ({"video_path": None}, "column 'video_path' is empty"),
        ({"video_path": "a\0.mp4"}, "column 'video_path' holds a NUL byte"),
        ({"video_path": "a" * 300}, "not in the layout.*OSError.*too long"),
        ({"video_path": 1.5}, "column 'video_path' must hold texts or whole numbers, not 1.5"),
    ],
)
def test_rows_that_cannot_be_read_are_named(root: Any, cells: dict[str, Any], message: str) -> None:
    root.files("video-tasks/frames/video_mret/QVHighlight/there/positive_1", "0.jpg")
    good = {"query": "q", "video_path": "there.mp4"}
    root.table("video-tasks/QVHighlight/test.jsonl", [good, {**good, **cells}])
    with pytest.raises(DataError, match=f"^QVHighlight: .*jsonl, row 1: .*{message}.*; get the"):
        root.read("QVHighlight")


@pytest.fixture
def seeker(root: Any) -> Any:
    frames = "video-tasks/frames/video_mret/MomentSeeker"
    root.files(f"{frames}/video_frames/clips_a", *(f"{n}.jpg" for n in range(12)))
    root.files(f"{frames}/video_frames/clips_b", "0.jpg")
    root.files(f"{frames}/clips", "a.jpg", "c.jpg")
    root.files(f"{frames}/query_images", "there.jpg")
    root.files(f"{frames}/video_frames/videos_q", "0.jpg")
    positive = [{"output_path": "clips/a.mp4", "frame_path": "videos/clips/a.jpg"}]
    negative = [
        {"output_path": "clips/b.mp4", "frame_path": "videos/clips/b.jpg"},
        {"output_path": "clips/c.mp4", "frame_path": "videos/clips/c.jpg"},
        {"output_path": "clips/d.mp4", "frame_path": None},
    ]
    inputs = ("", "images/there.jpg", "videos/q.mp4", "images/gone.jpg", "videos/gone.mp4", None)
    rows = [
        {"query": f"text {n}", "positive_frames": positive, "negative_frames": negative,
         "input_frames": given}
        for n, given in enumerate(inputs)
    ]  # fmt: skip
    root.table("video-tasks/data/momentseeker.jsonl", rows)
    return root


def test_momentseeker_as_upstream(seeker: Any) -> None:
    data = seeker.read("MomentSeeker")
    frames = seeker.path / "video-tasks/frames/video_mret/MomentSeeker"
    picture = "Select the video clip that aligns with the given text and image:"
    video = "Find the clip that corresponds to the given sentence and video segment:"
    text = "Find the clip that corresponds to the given text:"
    instructions = (text, picture, video, picture, video, text)
    assert [query.item.text for query in data.queries] == [
        f"{instruction} text {n}" for n, instruction in enumerate(instructions)
    ]
    images = [query.item.images for query in data.queries]
    assert images[1] == (frames / "query_images/there.jpg",)
    assert images[3] == (frames / "query_images/gone.jpg",)  # missing, and nothing in its place
    videos = [query.item.video for query in data.queries]
    assert videos[2] == (frames / "video_frames/videos_q/0.jpg",)
    assert videos[4] == (frames / "video_frames/videos_gone",)
    assert videos[0] is None and images[0] == ()
    names = [f"video_frames/clips_{letter}" for letter in "abcd"]
    assert list(data.candidates.names) == list(data.queries[0].candidates) == names
    assert data.queries[0].relevant == ("video_frames/clips_a",)
    clips = [data.candidates.item(place) for place in range(4)]
    assert {clip.text for clip in clips} == {CLIP}
    assert len(clips[0].video) == 12  # all frames, in the order of their numbers
    assert clips[0].video[10].name == "10.jpg"
    # Folders that are not there are named, also where a single frame could stand in for them.
    assert [clip.video for clip in clips[2:]] == [(frames / name,) for name in names[2:]]


def test_momentseeker_as_in_the_evaluation_of_plume(seeker: Any) -> None:
    data = seeker.read("MomentSeeker", momentseeker_leak=True)
    frames = seeker.path / "video-tasks/frames/video_mret/MomentSeeker"
    names = ["clips/a.jpg", "video_frames/clips_b", "clips/c.jpg", "video_frames/clips_d"]
    assert list(data.candidates.names) == names
    assert data.queries[0].relevant == ("clips/a.jpg",)
    # A frame of the right answer takes the place of what is missing, and of nothing else.
    assert data.queries[1].item.images == (frames / "query_images/there.jpg",)
    assert data.queries[3].item.images == (frames / "clips/a.jpg",)
    assert data.queries[2].item.video == (frames / "video_frames/videos_q/0.jpg",)
    assert data.queries[4].item.video == (frames / "clips/a.jpg",)


def test_momentseeker_of_the_corrected_sets_has_a_table_of_its_own(seeker: Any) -> None:
    old = seeker.path / "video-tasks/data/momentseeker.jsonl"
    rows = [json.loads(line) for line in old.read_text().splitlines()]
    seeker.table("video-tasks/data/momentseeker_1k6.jsonl", rows[:2])
    assert len(seeker.read("MomentSeeker").queries) == len(rows)
    assert len(seeker.read("MomentSeeker", corrected=True).queries) == 2
    # The file of 1,800 rows was handed on under the new name.
    seeker.table("video-tasks/data/momentseeker_1k6.jsonl", rows * 300)
    with pytest.raises(DataError, match="1602"):
        seeker.read("MomentSeeker", corrected=True)


def test_momentseeker_rows_without_an_answer_are_named(root: Any) -> None:
    cells = {"query": "q", "positive_frames": [], "negative_frames": [], "input_frames": ""}
    root.table("video-tasks/MomentSeeker/test.jsonl", [cells])
    with pytest.raises(DataError, match="row 0: 'positive_frames' is empty"):
        root.read("MomentSeeker")
