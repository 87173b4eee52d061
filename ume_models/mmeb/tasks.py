"""What a benchmark task is: where its data lie, how it is ranked and what its score is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ume_models.errors import DataError

Modality: TypeAlias = Literal["image", "video", "visdoc"]
Ranking: TypeAlias = Literal["local", "global"]
Labels: TypeAlias = Literal["fixed", "legacy"]
InstructionSet: TypeAlias = Literal["plume", "vlm2vec"]

HIT = "hit@1"
NDCG = "ndcg_linear@5"


@dataclass(frozen=True)
class Source:
    """Where the tables of a task are published.

    Attributes:
        repository: hub id; below a data root also the last part of it alone is looked for.
        config: name of the configuration (sub-folder), or None.
        split: name of the split.
        paths: other places below the data root, as the official evaluations use them: a folder
            with that configuration, or a ``.jsonl`` file.
    """

    repository: str
    config: str | None
    split: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instructions:
    """What stands in front of the two sides' texts; empty where the rows bring it or none does."""

    query: str = ""
    target: str = ""


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    Attributes:
        name: as in published score tables.
        benchmark: its name, one of ``benchmarks.BENCHMARKS``.
        modality: the third of MMEB-v2 that it belongs to.
        group: the finer group whose mean papers report, such as "I-CLS".
        reader: which published layout its data have, a key of ``readers.READERS``.
        ranking: "local": each query ranks its own list of candidates; "global": all of them.
        metric: the one that is its score.
        source: where the tables are.
        media: folders below the data root with its images or frames; the first that exists counts.
        instructions: as upstream VLM2Vec has them.
        plume_instructions: as the evaluation of PLUME has them, where that differs.
        legacy_source: the tables with the labels published first, where they were wrong.
        limit: number of queries of the official evaluation, where it takes the first so many.
        most: queries of this version of the task; a table with more is of another one.
    """

    name: str
    benchmark: str
    modality: Modality
    group: str
    reader: str
    ranking: Ranking
    metric: str
    source: Source
    media: tuple[str, ...]
    instructions: Instructions = Instructions()
    plume_instructions: Instructions | None = None
    legacy_source: Source | None = None
    limit: int | None = None
    most: int | None = None

    def tables(self, labels: Labels) -> Source:
        """Where the tables of one version of the labels are."""
        return self.legacy_source if labels == "legacy" and self.legacy_source else self.source

    def wording(self, instruction_set: InstructionSet) -> Instructions:
        """The instructions of one set."""
        if instruction_set == "plume" and self.plume_instructions is not None:
            return self.plume_instructions
        return self.instructions


def select_tasks(
    tasks: Iterable[Task],
    *,
    names: Sequence[str] | str | None = None,
    modalities: Sequence[str] | str | None = None,
) -> list[Task]:
    """The tasks of these names or groups, and of these modalities, in the order of the table.

    Args:
        tasks: the table.
        names: names or groups ("I-CLS"), case ignored, in one string with commas or several;
            None for all.
        modalities: "image", "video", "visdoc", in the same way; None for all.

    Raises:
        DataError: a name, group or modality is unknown, or nothing is left.
        TypeError: ``tasks`` are no tasks.
    """
    table = list(tasks)
    if not all(isinstance(task, Task) for task in table):
        raise TypeError('the table comes first: select_tasks(benchmark("MMEB-v2"), names=["CIRR"])')
    names = names.split(",") if isinstance(names, str) else names
    modalities = modalities.split(",") if isinstance(modalities, str) else modalities
    chosen = table
    if names:
        known = {label.lower() for task in table for label in (task.name, task.group)}
        wanted = [name.strip().lower() for name in names]
        for name in wanted:
            if name not in known:
                raise DataError(_unknown("task", name, {t.name for t in table}))
        chosen = [task for task in chosen if {task.name.lower(), task.group.lower()} & {*wanted}]
    if modalities:
        known = {task.modality for task in table}
        modalities = [modality.strip().lower() for modality in modalities]
        for modality in modalities:
            if modality not in known:
                raise DataError(_unknown("modality", modality, known))
        chosen = [task for task in chosen if task.modality in modalities]
    if not chosen:
        raise DataError("no task has one of these names and one of these modalities")
    return chosen


def _unknown(what: str, name: str, known: set[str]) -> str:
    by_lower = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name, by_lower, n=3, cutoff=0.5)
    meant = f"; did you mean {', '.join(by_lower[entry] for entry in near)}?" if near else ""
    return f"unknown {what} {name!r}{meant or ' (known: ' + ', '.join(sorted(known)[:8]) + ', …)'}"
