"""Video retrieval: a caption, ranked videos. Data sets differ in the names of their columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.frames import FrameFolders
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import name_of, row_named, text_of, texts_of
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.readers.wording import instruct
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item


def read_msrvtt(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """MSR-VTT: one caption per video."""
    return _read(task, root, options, "video_id", "caption", _same)


def read_msvd(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """MSVD: the first of a video's captions."""
    return _read(task, root, options, "video_id", "caption", _same, several=True)


def read_didemo(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """DiDeMo: videos are named by files."""
    return _read(task, root, options, "video", "caption", _stem)


def read_youcook2(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """YouCook2: one sentence per clip."""
    return _read(task, root, options, "id", "sentence", _same)


def read_vatex(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """VATEX: the first of a video's English captions."""
    return _read(task, root, options, "videoID", "enCap", _same, several=True)


def _same(value: str) -> str:
    return value


def _stem(value: str) -> str:
    return os.path.splitext(os.path.basename(value))[0]


def _read(
    task: Task,
    root: Path,
    options: ReadOptions,
    video_column: str,
    caption_column: str,
    name_from: Callable[[str], str],
    *,
    several: bool = False,
) -> TaskData:
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    words = task.wording(options.instructions)
    for index, row in enumerate(table.rows(video_column, caption_column)):
        with row_named(table, index):
            name = name_from(name_of(row, video_column))
            caption = (texts_of if several else _only)(row, caption_column)[0]
        mentions.add(name, name, partial(_video, name, words.target, folder, videos))
        if options.limit is None or index < options.limit:
            item = Item(instruct(words.query, caption), id=str(index))
            queries.append(Query(item, (name,), labels=(name,)))
    return TaskData(task, queries, mentions.candidates(), table.files)


def _video(name: str, text: str, folder: Path, videos: FrameFolders) -> Item:
    return Item(text, video=videos.video(folder / name), id=name)


def _only(row: Mapping[str, Any], column: str) -> Sequence[str]:
    return (text_of(row, column),)
