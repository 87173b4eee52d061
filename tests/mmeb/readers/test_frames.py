"""Frames of a video: their order and which of them are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from ume_models.mmeb.frames import FrameFolders, missing_frames, sampled_positions
from ume_models.processing.items import Item


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, 8, [0, 1, 2, 3, 4, 5, 6, 8]),
        (64, 8, [0, 9, 18, 27, 36, 45, 54, 63]),
        (10, 4, [0, 3, 6, 9]),
        (5, 8, [0, 1, 2, 3, 4]),
        (3, 1, [0]),
    ],
)
def test_positions_are_even_and_rounded_down(length: int, count: int, expected: list[int]) -> None:
    assert sampled_positions(length, count) == expected


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["frame_10.jpg", "frame_9.PNG", "b2.jpeg", "B1.jpg", "3.jpg", "20.jpg", "01.jpg",
             "1.jpg", "list.txt", "video.mp4"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    frames = FrameFolders().frames(tmp_path)
    assert [frame.name for frame in frames] == [
        "01.jpg", "1.jpg", "3.jpg", "20.jpg", "B1.jpg", "b2.jpeg", "frame_9.PNG", "frame_10.jpg",
    ]  # fmt: skip


def test_what_is_missing_is_known_without_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "clip.mp4"
    assert FrameFolders().video(folder) == (folder,)
    folder.mkdir()
    assert FrameFolders().video(folder) == (folder,)  # empty
    assert missing_frames(Item(video=(folder,))) == folder
    (folder / "0.jpg").touch()
    assert missing_frames(Item(video=FrameFolders().video(folder))) is None
    assert missing_frames(Item("text")) is None


def test_as_many_frames_as_asked_for_stand_for_a_video(tmp_path: Path) -> None:
    for number in range(70):
        (tmp_path / f"{number}.jpg").touch()
    counts = [len(FrameFolders(count).video(tmp_path)) for count in (None, 16, 64)]
    assert counts == [8, 16, 64]
    assert len(FrameFolders().video(tmp_path, whole=True)) == 70


def test_a_folder_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").touch()
    folders = FrameFolders()
    folders.frames(tmp_path)
    (tmp_path / "1.jpg").touch()
    assert len(folders.frames(tmp_path)) == 1
