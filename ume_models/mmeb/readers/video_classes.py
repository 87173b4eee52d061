"""Video classification: among all classes of a data set, or among choices of each row."""

from __future__ import annotations

import json
from pathlib import Path

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.frames import FrameFolders
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import name_of, row_named, text_of, texts_of
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.readers.wording import instruct
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_CLASSES = Path(__file__).resolve().parent.parent / "classes"


def class_names(task: str) -> list[str]:
    """The classes of a data set, in the order of the official evaluation.

    Raises:
        DataError: the task has no list of classes.
    """
    try:
        names: list[str] = json.loads((_CLASSES / f"{task}.json").read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(path.stem for path in _CLASSES.glob("*.json")))
        raise DataError(f"there is no list of classes for {task!r} (there are {known})") from None
    return names


def read_classes(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """All classes are candidates: those of the rows first, then the rest of the list."""
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    text = instruct(task.wording(options.instructions).query)
    rows: list[tuple[str, str]] = []
    for index, row in enumerate(table.rows("video_id", "pos_text")):
        with row_named(table, index):
            rows.append((name_of(row, "video_id"), text_of(row, "pos_text")))
        mentions.add_text(rows[-1][1], rows[-1][1])
    for index, (video, label) in enumerate(rows[: options.limit]):
        item = Item(text, video=videos.video(folder / video), id=str(index))
        queries.append(Query(item, (label,), labels=(label,)))
    for name in class_names(task.name):
        mentions.add_text(name, name)
    return TaskData(task, queries, mentions.candidates(), table.files)


def read_choices(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Every row has its own choices, the right one among those in the column of the wrong ones."""
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    text = instruct(task.wording(options.instructions).query)
    for index, row in enumerate(table.rows("video_id", "pos_text", "neg_text")):
        if index == task.limit:
            break
        with row_named(table, index):
            label, choices = text_of(row, "pos_text"), texts_of(row, "neg_text")
            name_of_video = name_of(row, "video_id")
        for name in choices:
            mentions.add_text(name, name)
        if options.limit is None or index < options.limit:
            video = videos.video(folder / name_of_video)
            names = mentions.names(choices)
            query = Item(text, video=video, id=str(index))
            queries.append(Query(query, (label,), candidates=names, labels=(label,)))
    return TaskData(task, queries, mentions.candidates(), table.files)
