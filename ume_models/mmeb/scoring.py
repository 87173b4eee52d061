"""Embeddings to scores, task by task, as soon as a task's last shard is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch

from ume_models.atomic import write_atomically
from ume_models.errors import DataError
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.dataset import TaskData
from ume_models.mmeb.embeddings import EmbeddingLookup
from ume_models.mmeb.listing import Listing, answers_digest
from ume_models.mmeb.plan import KeyedStore, Work
from ume_models.mmeb.progress import Progress
from ume_models.mmeb.ranking import rank_task
from ume_models.mmeb.results import RunFolder, TaskScore, score_task
from ume_models.mmeb.settings import EvalOptions
from ume_models.mmeb.summary import Summary, summarise
from ume_models.mmeb.table_files import changed_tables
from ume_models.mmeb.tasks import Task

_NAMED = 5


@dataclass(eq=False)
class Scorer:
    """Ranks and scores tasks when their embeddings are there.

    Args:
        stores: the stores of the evaluation.
        read: the tasks.
        listings: what each of them needs.
        missing: receives the reason for every task without a score.
        results: where scores are written.
        options: how tasks are ranked.
        device: where they are ranked.
        progress: told of every score.
    """

    stores: Mapping[str, KeyedStore]
    read: InitVar[Sequence[TaskData]]
    listings: InitVar[Sequence[Listing]]
    missing: dict[str, str]
    results: RunFolder
    options: EvalOptions
    device: torch.device
    progress: Progress

    def __post_init__(self, read: Sequence[TaskData], listings: Sequence[Listing]) -> None:
        self.lookup = EmbeddingLookup(self.stores)
        self._known: set[tuple[str, int]] = set()
        self._waiting = [
            (data, listing, list(listing.all_keys()))
            for data, listing in zip(read, listings, strict=True)
        ]

    def look_for(self, work: Sequence[Work]) -> list[Work]:
        """Take note of shards that this or another process has finished; return the others."""
        unseen = []
        for part in work:
            place = (part.store, part.shard)
            if place in self._known:
                continue
            if self.stores[part.store].store.has(part.shard):
                self._known.add(place)
                self.lookup.add(*place)
            else:
                unseen.append(part)
        return unseen

    def score_ready(self) -> None:
        """Score every task that waits for nothing any more.

        Raises:
            DataError: with ``on_error="stop"``, a task cannot be ranked; it is named.
            StoreError: a shard is damaged.
            OSError: results cannot be written.
        """
        still = []
        for data, listing, keys in self._waiting:
            while keys and self.lookup.has(keys[-1]):
                keys.pop()
            if keys:
                still.append((data, listing, keys))
            else:
                self._score(data, listing)
        self._waiting = still

    def _score(self, data: TaskData, listing: Listing) -> None:
        task = data.task
        made_from = answers_digest(data, listing)
        if self.results.finished(task.name) and self.results.made_from(task.name) == made_from:
            self.progress.scored(self.results.score(task.name))  # an earlier run ranked it
            return
        rows, problems = self.lookup.find([*listing.all_keys()])
        if problems:
            reasons = first_few(
                f"{len(problems)} of its items cannot be embedded", problems.values()
            )
            self._lack(task.name, reasons)
            return
        try:
            rankings = rank_task(
                task,
                data.queries,
                rows[: len(listing.queries)],
                listing.names,
                rows[len(listing.queries) :],
                top=self.options.top,
                device=self.device,
            )
            score = score_task(task, rankings, len(listing.names), legacy=self.options.legacy_ndcg)
        except DataError as error:
            if self.options.on_error == "stop":
                raise
            self._lack(task.name, str(error))
            return
        self.results.write(score, rankings, made_from=made_from)
        self.progress.scored(score)

    def _lack(self, task: str, reason: str) -> None:
        """Note a task without a score; one it had before was of other data."""
        self.missing[task] = reason
        self.results.discard(task)


def conclude(
    folder: RunFolder,
    manifest: Mapping[str, Any],
    evaluated: Sequence[Task],
    missing: Mapping[str, str],
) -> Summary:
    """Sum up all tasks that were ever asked for in a folder, and write ``summary.json``.

    Args:
        folder: the results.
        manifest: of the folder; its tasks are those that were asked for.
        evaluated: the tasks of this run; the scores of others are those of earlier runs.
        missing: why tasks have no score.

    Raises:
        OSError: the summary cannot be written.
    """
    asked = {*manifest["tasks"]}
    tasks = [task for task in benchmark(manifest["benchmark"]) if task.name in asked]
    others = asked - {task.name for task in evaluated}
    missing = {**changed_tables(folder.path, others), **missing}
    scores: dict[str, TaskScore] = {
        task.name: folder.score(task.name)
        for task in tasks
        if task.name not in missing and folder.finished(task.name)
    }
    values = {name: folder.values(name) for name in scores}
    summary = summarise(tasks, scores, values, missing, folder.settings())
    text = json.dumps(summary.to_json(), ensure_ascii=False, indent=1) + "\n"
    write_atomically(folder.path / "summary.json", text.encode())
    return summary


def first_few(what: str, entries: Iterable[str]) -> str:
    """A sentence and the first few of what it is about, one per line."""
    entries = list(entries)
    lines = [f"{what}:", *(f"  {entry}" for entry in entries[:_NAMED])]
    if len(entries) > _NAMED:
        lines.append(f"  … and {len(entries) - _NAMED} more")
    return "\n".join(lines)
