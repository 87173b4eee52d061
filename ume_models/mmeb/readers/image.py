"""The 36 image tasks: every row brings its instructions and its own list of candidates.

Published as ``ziyjiang/MMEB_Test_Instruct``, one configuration per task. The first target of a row
is the answer. White space follows the first version of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import (
    optional_text_of,
    path_of,
    paths_of,
    row_named,
    text_of,
    texts_of,
)
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.readers.wording import as_in_v1, instruct, without_placeholder
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_Row: TypeAlias = Mapping[str, Any]
# Name, text and path (empty for none) of each candidate of a row.
_Targets: TypeAlias = "Sequence[tuple[str, str, str]]"

_PICTURE_QUERY = ("qry_inst", "qry_text", "qry_img_path")
_PICTURE_TARGET = ("tgt_inst", "tgt_text", "tgt_img_path")


def read_classes(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Classification: a picture, ranked class names."""
    columns = (*_PICTURE_QUERY, "tgt_text")
    return _read(task, root, options, columns, _picture_query, _text_targets)


def read_image_to_text(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """A picture, ranked captions."""
    return read_classes(task, root, options)


def read_answers(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Questions about a picture, ranked answers."""
    columns = (*_PICTURE_QUERY, "tgt_text")
    return _read(task, root, options, columns, _question, _text_targets)


def read_text_to_image(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """A text, ranked pictures, which have captions in some tasks."""
    # One line break more in this task, also a custom of the first version.
    end = "\n\n" if task.name == "VisDial" else "\n"

    def query(row: _Row) -> tuple[str, str]:
        instruction = without_placeholder(optional_text_of(row, "qry_inst"))
        return f"{instruction} {text_of(row, 'qry_text')}{end}", ""

    def targets(row: _Row) -> _Targets:
        texts, paths = _picture_targets(row, end_without_caption="\n")
        return list(zip(paths, texts, paths, strict=True))

    return _read(task, root, options, ("qry_inst", "qry_text", *_PICTURE_TARGET), query, targets)


def read_image_to_image(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """A picture and a text, ranked pictures or regions of pictures."""
    return _read(
        task, root, options, (*_PICTURE_QUERY, *_PICTURE_TARGET), _question, _region_targets
    )


def _read(
    task: Task,
    root: Path,
    options: ReadOptions,
    columns: Sequence[str],
    query: Callable[[_Row], tuple[str, str]],
    targets: Callable[[_Row], _Targets],
) -> TaskData:
    table = open_table(locate(task.tables(options.labels), root, download=options.download))
    folder = media_folder(task, root)
    mentions = Mentions()
    queries: list[Query] = []
    for index, row in enumerate(table.rows(*columns)):
        with row_named(table, index):
            listed = targets(row)
            for name, text, path in listed:
                mentions.add(name, (text, path), partial(_item, name, text, path, folder))
            if options.limit is None or index < options.limit:
                names = mentions.names([name for name, _, _ in listed])
                item = _item(str(index), *query(row), folder)
                queries.append(Query(item, names[:1], candidates=names, labels=names[:1]))
    return TaskData(task, queries, mentions.candidates(), table.files)


def _item(name: str, text: str, path: str, folder: Path) -> Item:
    return Item(text, (folder / path,) if path else (), id=name)


def _picture_query(row: _Row) -> tuple[str, str]:
    instruction = without_placeholder(optional_text_of(row, "qry_inst"))
    text = instruct(instruction, optional_text_of(row, "qry_text"))
    return as_in_v1(text) + "\n", path_of(row, "qry_img_path")


def _question(row: _Row) -> tuple[str, str]:
    instruction = "\n" + without_placeholder(optional_text_of(row, "qry_inst")).strip()
    text = instruct(instruction, optional_text_of(row, "qry_text"))
    return as_in_v1(text) + "\n", path_of(row, "qry_img_path")


def _text_targets(row: _Row) -> _Targets:
    return [(text, text, "") for text in texts_of(row, "tgt_text")]


def _picture_targets(row: _Row, end_without_caption: str) -> tuple[list[str], Sequence[str]]:
    """Texts and paths; whether candidates have captions is seen from the first one."""
    captions, paths = texts_of(row, "tgt_text"), paths_of(row, "tgt_img_path")
    if not all(paths):
        raise DataError(f"path {list(paths).index('')} of 'tgt_img_path' is empty")
    instruction = without_placeholder(optional_text_of(row, "tgt_inst"))
    if not captions[0].strip():
        return [as_in_v1(instruction) + end_without_caption] * len(paths), paths
    _require_pairs(captions, paths)
    return [as_in_v1(f"{instruction} {caption}") + "\n" for caption in captions], paths


def _region_targets(row: _Row) -> _Targets:
    texts, paths = _picture_targets(row, end_without_caption="")
    captions = texts_of(row, "tgt_text")
    _require_pairs(captions, paths)
    # Several regions of one picture may be candidates, so the caption belongs to the name.
    pairs = zip(paths, captions, strict=True)
    names = [path + ":" + caption.strip('"') for path, caption in pairs]
    return list(zip(names, texts, paths, strict=True))


def _require_pairs(captions: Sequence[str], paths: Sequence[str]) -> None:
    if len(captions) != len(paths):
        raise DataError(
            f"'tgt_text' has {len(captions)} entries and 'tgt_img_path' has {len(paths)}, but they "
            "are pairs"
        )
