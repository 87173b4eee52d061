"""One shard of an evaluation: its items read, embedded and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ume_models.embedder import Embedder
from ume_models.encode import EncodeStats, encode_detailed
from ume_models.errors import DataError, ItemError
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.keys import ContentKeys
from ume_models.mmeb.listing import Place
from ume_models.mmeb.plan import KeyedStore
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.settings import EvalOptions
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item
from ume_models.store import Record, Shard, Skipped


class Library:
    """The tasks of an evaluation, read when they are first needed.

    Args:
        tasks: the selected tasks.
        root: the data root.
        options: how they are read.
    """

    def __init__(self, tasks: Sequence[Task], root: Path, options: ReadOptions) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._root = root
        self._options = options
        self._read: dict[str, TaskData] = {}

    def data(self, task: str) -> TaskData:
        """The data of a task.

        Raises:
            DataError: it cannot be read.
        """
        if task not in self._read:
            self._read[task] = read_task(self._tasks[task], self._root, self._options)
        return self._read[task]

    def verify(self, keys: Sequence[str], places: Mapping[str, Place]) -> None:
        """Make sure that what lies at a place is what was listed there.

        The files are read now, not looked up: the embedder reads them next anyway.

        Raises:
            DataError: data changed since they were listed, or this process has other ones.
        """
        read = ContentKeys(None, self._root)

        def item(number: int) -> Item:
            place = places[keys[number]]
            return place.item(self.data(place.task))

        for key, found in zip(keys, read.keys(item, len(keys)), strict=True):
            if key != found:
                raise DataError(
                    f"{places[key]}: not what was listed when the evaluation began; its data "
                    "changed, or this process has another data root"
                )


def embed_shard(
    model: Embedder,
    held: KeyedStore,
    shard: int,
    places: Mapping[str, Place],
    library: Library,
    options: EvalOptions,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeStats:
    """Embed the items of a shard and write it.

    Args:
        model: a loaded model.
        held: the store of the shard.
        shard: its number.
        places: where the content of each key is found.
        library: the tasks.
        options: how to embed, and what to do with an item that cannot be.
        progress: called with the numbers of finished and of all items.

    Returns:
        What embedding did, with its times.

    Raises:
        DataError: an item cannot be embedded; the task and the item are named.
        OSError: the disk is full or not writable.
    """
    keys = held.shard_keys(shard)
    library.verify(keys, places)
    items = [_as_embedded(places[key].item(library.data(places[key].task))) for key in keys]
    try:
        output = encode_detailed(
            model,
            items,
            batch_tokens=options.batch_tokens,
            workers=options.workers,
            on_error="raise" if options.on_error == "stop" else "skip",
            progress=progress or False,
            **options.options,
        )
    except ItemError as error:
        if error.index is None:
            raise
        raise DataError(
            f"{places[keys[error.index]]}: {error.reason} (what is done is kept; --on-error skip "
            "goes on without the task)"
        ) from error
    first = held.store.item_range(shard).start
    problems = {problem.index: problem.reason for problem in output.errors}
    kept = [row for row in range(len(keys)) if row not in problems]
    held.store.write(
        shard,
        Shard(
            rows=torch.tensor([first + row for row in kept], dtype=torch.int64),
            embeddings=output.embeddings[kept],
            records=[Record(keys[row]) for row in kept],
            skipped=[
                Skipped(first + row, keys[row], problems[row])
                for row in range(len(keys))
                if row in problems
            ],
        ),
    )
    return output.stats


def _as_embedded(item: Item) -> Item:
    """The item as the official evaluation embeds it.

    An empty text goes through the same prompt as any other there; without a character it would be
    the prompt of a missing input, which has no picture.
    """
    if not item.text and not item.instruction and not item.images and item.video is None:
        return replace(item, text=" ")
    return item
