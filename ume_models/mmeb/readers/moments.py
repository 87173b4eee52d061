"""Moment retrieval: a scene described in words, ranked clips of the video.

Clips are named by their folders below the frame root, where the official evaluation has absolute
paths: names are the same on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.frames import FRAME_SUFFIXES, FrameFolders
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import (
    name_of,
    optional_path_of,
    path_of,
    row_named,
    text_of,
)
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.readers.wording import instruct
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_QUERY_FOLDER = "query"
_ANSWER = "positive"

_FRAMES_OF_CLIPS = "video_frames"

# MomentSeeker words its queries by what comes with the text; the task's own is for text alone.
_WITH_PICTURE = "Select the video clip that aligns with the given text and image:"
_WITH_VIDEO = "Find the clip that corresponds to the given sentence and video segment:"


def read_moments(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Charades-STA and QVHighlights: a folder per video with folders of the query and of clips.

    Raises:
        DataError: also for videos without a folder of their own, or without a clip whose name
            begins with "positive".
    """
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    clips: dict[str, list[str]] = {}
    unanswered: dict[str, None] = {}
    words = task.wording(options.instructions)
    for index, row in enumerate(table.rows("query", "video_path")):
        with row_named(table, index):
            text = text_of(row, "query")
            video = os.path.splitext(os.path.basename(name_of(row, "video_path")))[0]
            if video not in clips:
                clips[video] = _clips(folder / video)
        for clip in clips[video]:
            name = f"{video}/{clip}"
            mentions.add(name, name, partial(_sampled_clip, name, words.target, folder, videos))
        answers = [clip for clip in clips[video] if clip.startswith(_ANSWER)]
        if not answers:
            unanswered[video] = None
        elif options.limit is None or index < options.limit:
            names = mentions.names([f"{video}/{clip}" for clip in clips[video]])
            answer = f"{video}/{answers[-1]}"
            frames = videos.video(folder / video / _QUERY_FOLDER)
            item = Item(instruct(words.query, text), video=frames, id=str(index))
            queries.append(Query(item, (answer,), candidates=names, labels=(answer,)))
    if unanswered:
        raise DataError(
            f"{len(unanswered)} videos have no folder, or no clip named {_ANSWER!r} in it, below "
            f"{folder}: {', '.join([*unanswered][:3])}{', …' if len(unanswered) > 3 else ''}; "
            "extract the frames published for this task there"
        )
    return TaskData(task, queries, mentions.candidates(), table.files)


def read_momentseeker(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """MomentSeeker: queries of text alone, with a picture, or with a video; clips in every row.

    With ``momentseeker_leak`` as in the evaluation of PLUME: clips are single frames where the
    table names one, and a query whose own picture or video is missing is given a frame of the right
    answer. Otherwise as upstream: clips are folders of frames, and what is missing is named.
    """
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    words = task.wording(options.instructions)
    columns = ("query", "positive_frames", "negative_frames", "input_frames")
    for index, row in enumerate(table.rows(*columns)):
        with row_named(table, index):
            answers = [_find(clip, folder, options.momentseeker_leak)
                       for clip in _entries(row, "positive_frames")]  # fmt: skip
            others = [_find(clip, folder, options.momentseeker_leak)
                      for clip in _entries(row, "negative_frames")]  # fmt: skip
            if not answers:
                raise DataError("'positive_frames' is empty, so the query has no answer")
            listed = [*answers, *others]
            for name in listed:
                mentions.add(name, name, partial(_whole_clip, name, words.target, folder, videos))
            if options.limit is None or index < options.limit:
                names = mentions.names(listed)
                relevant = tuple(dict.fromkeys(names[: len(answers)]))
                item = _query(row, index, folder, words.query, videos, options.momentseeker_leak)
                queries.append(Query(item, relevant, candidates=names, labels=relevant))
    return TaskData(task, queries, mentions.candidates(), table.files)


def _clips(folder: Path) -> list[str]:
    """Folders of clips; in the order of their names, where the official order is the disk's."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name != _QUERY_FOLDER and not e.is_file())


def _sampled_clip(name: str, text: str, folder: Path, videos: FrameFolders) -> Item:
    return Item(instruct(text), video=videos.video(folder / name), id=name)


def _whole_clip(name: str, text: str, folder: Path, videos: FrameFolders) -> Item:
    place = folder / name
    if place.suffix.lower() in FRAME_SUFFIXES:
        return Item(instruct(text), video=(place,), id=name)
    return Item(instruct(text), video=videos.video(place, whole=True), id=name)


def _entries(row: Mapping[str, Any], column: str) -> Sequence[Mapping[str, Any]]:
    clips = row[column]
    if not isinstance(clips, list) or not all(isinstance(clip, Mapping) for clip in clips):
        raise DataError(f"column {column!r} must hold lists of clips with their paths")
    return clips


def _find(clip: Mapping[str, Any], folder: Path, single_frames: bool) -> str:
    """Where a clip's frames are, relative to the frame root; that is its name as well."""
    frame = _existing(folder, optional_path_of(clip, "frame_path")) if single_frames else None
    return frame or f"{_FRAMES_OF_CLIPS}/{_folder_name(path_of(clip, 'output_path'))}"


def _folder_name(path: str) -> str:
    return path.replace("/", "_").split(".mp4")[0]


def _existing(folder: Path, path: str) -> str | None:
    """A path of a table in one of the places where publications of the frames have it."""
    if not path:
        return None
    places = [path]
    if path.startswith("videos/"):
        places.append(path.removeprefix("videos/"))
    if path.startswith("images/"):
        places += [path.removeprefix("images/"), f"query_{path}"]
    return next((place for place in places if (folder / place).exists()), None)


def _query(
    row: Mapping[str, Any],
    index: int,
    folder: Path,
    instruction: str,
    videos: FrameFolders,
    leak: bool,
) -> Item:
    text, given = text_of(row, "query"), optional_path_of(row, "input_frames")
    answers = _entries(row, "positive_frames")
    leaked = _existing(folder, optional_path_of(answers[0], "frame_path")) if leak else None
    if given.endswith(".mp4"):
        place = folder / _FRAMES_OF_CLIPS / _folder_name(given)
        if leaked and not place.exists():
            video: tuple[Path, ...] = (folder / leaked,)
        else:
            video = videos.video(place, whole=True)
        return Item(instruct(_WITH_VIDEO, text), video=video, id=str(index))
    if given.endswith(".jpg"):
        path = _existing(folder, f"query_{given}") or _existing(folder, given) or leaked
        picture = folder / (path or f"query_{given}")
        return Item(instruct(_WITH_PICTURE, text), (picture,), id=str(index))
    return Item(instruct(instruction, text), id=str(index))
