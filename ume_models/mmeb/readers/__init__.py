"""Readers: one per layout that benchmarks are published in."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from ume_models.errors import DataError
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.readers.cells import UNEXPECTED, unexpected
from ume_models.mmeb.tasks import Task


class Reader(Protocol):
    """Reads one task below a data root."""

    def __call__(self, task: Task, root: Path, options: ReadOptions) -> TaskData: ...


# Module of this package and function for every value of ``Task.reader``. Modules are imported when
# a task needs them.
READERS: dict[str, tuple[str, str]] = {
    "image_cls": ("image", "read_classes"),
    "image_qa": ("image", "read_answers"),
    "image_i2t": ("image", "read_image_to_text"),
    "image_t2i": ("image", "read_text_to_image"),
    "image_i2i": ("image", "read_image_to_image"),
    "video_cls": ("video_classes", "read_classes"),
    "video_choice": ("video_classes", "read_choices"),
    "msrvtt": ("video_retrieval", "read_msrvtt"),
    "msvd": ("video_retrieval", "read_msvd"),
    "didemo": ("video_retrieval", "read_didemo"),
    "youcook2": ("video_retrieval", "read_youcook2"),
    "vatex": ("video_retrieval", "read_vatex"),
    "moments": ("moments", "read_moments"),
    "momentseeker": ("moments", "read_momentseeker"),
    "videomme": ("video_questions", "read_videomme"),
    "nextqa": ("video_questions", "read_nextqa"),
    "egoschema": ("video_questions", "read_egoschema"),
    "mvbench": ("video_questions", "read_mvbench"),
    "activitynetqa": ("video_questions", "read_activitynetqa"),
    "vidore": ("documents", "read_vidore"),
    "visrag": ("documents", "read_visrag"),
    "mmeb_v1": ("mmeb_v1", "read"),
    "mbeir": ("mbeir", "read"),
}


def reader(name: str) -> Reader:
    """The reader of one layout, a key of ``READERS``.

    Raises:
        DataError: there is none of that name.
    """
    if name not in READERS:
        raise DataError(f"there is no reader {name!r} (known: {', '.join(READERS)})")
    module, function = READERS[name]
    found: Reader = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return found


def read_task(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Read the queries of a task and list its candidates.

    Tables are read as far as listing needs it; pictures are not. Media that do not exist do not
    stop the reading: their paths stand in the items, and embedding an item names them.

    Args:
        task: the task.
        root: the data root, the folder with ``image-tasks``, ``video-tasks``, ``visdoc-tasks``.
        options: wording, label version, number of queries.

    Raises:
        DataError: tables are missing or lack columns, or an answer cannot be resolved; the message
            names the task, the place and the remedy.
    """
    try:
        data = reader(task.reader)(task, root, options)
        if task.most is not None and len(data.queries) > task.most:
            raise DataError(
                f"{data.files[0]} has {len(data.queries)} queries, and this version of the task "
                f"{task.most}: get {task.source.repository} again"
            )
        return data
    except DataError as error:
        raise DataError(error.message, task=task.name) from error
    except UNEXPECTED as error:
        # One odd table must not end the reading of all others.
        raise DataError(
            f"a table of {task.tables(options.labels).repository}, or a folder of its media, "
            f"cannot be read: {unexpected(error)}; get it again",
            task=task.name,
        ) from error
