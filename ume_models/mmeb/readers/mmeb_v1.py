"""MMEB-V1: texts with their instructions, and each query's candidates, the answer first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import (
    optional_path_of,
    optional_text_of,
    path_of,
    paths_of,
    row_named,
    texts_of,
)
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.readers.wording import has_placeholder, without_placeholder
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item


def read(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Queries with the first target as their answer; each is ranked among the targets of its row.

    Columns: ``qry_text``, ``qry_img_path``, and the equally long lists ``tgt_text`` and
    ``tgt_img_path``, each empty where a side has no text or no picture. The token that stands for
    the picture is left out of the texts, as processing puts pictures in front.

    Args:
        task: a task of ``mmeb_v1.MMEB_V1``.
        root: the data root.
        options: ``limit`` and ``download`` count; there is one version of labels and wording.

    Raises:
        DataError: tables are missing or damaged, or a row has no targets, or not as many texts as
            pictures, or a text has a place for a picture and there is none.
    """
    table = open_table(locate(task.source, root, download=options.download))
    media = media_folder(task, root).absolute()
    queries: list[Query] = []
    mentions = Mentions()
    columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    for index, row in enumerate(table.rows(*columns)):
        with row_named(table, index):
            targets = _targets(row)
            for name, text, path in targets:
                mentions.add(name, (text, path), partial(_item, name, text, path, media))
            if options.limit is None or index < options.limit:
                names = mentions.names([name for name, _, _ in targets])
                asked = optional_text_of(row, "qry_text")
                find = path_of if has_placeholder(asked) else optional_path_of
                item = _item(str(index), _text(asked), find(row, "qry_img_path"), media)
                queries.append(Query(item, names[:1], candidates=names, labels=names[:1]))
    return TaskData(task, queries, mentions.candidates(), table.files)


def _targets(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, text and path of each target.

    One picture may be a candidate with several texts, so the text belongs to the name.
    """
    texts, paths = texts_of(row, "tgt_text"), paths_of(row, "tgt_img_path")
    if len(texts) != len(paths):
        raise DataError(
            f"'tgt_text' has {len(texts)} entries and 'tgt_img_path' has {len(paths)}, but they "
            "are pairs"
        )
    for place, (text, path) in enumerate(zip(texts, paths, strict=True)):
        if has_placeholder(text) and not path:
            raise DataError(f"path {place} of 'tgt_img_path' is empty")
    pairs = [(_text(text), path) for text, path in zip(texts, paths, strict=True)]
    return [(f"{path}:{text}" if path else text, text, path) for text, path in pairs]


def _text(text: str) -> str:
    """What is embedded of a text."""
    return without_placeholder(text).strip()


def _item(name: str, text: str, path: str, media: Path) -> Item:
    return Item(text, (media / path,) if path else (), id=name)
