"""Results of a run on disk: per task its score, and what was found for each query.

    RUN/run.json                            what was evaluated, and with which settings
    RUN/tasks/TASK/predictions.jsonl        one line per query, in the order of the tables
    RUN/tasks/TASK/scores.json              a ``TaskScore``, and the SHA-256 of the predictions
    RUN/summary.json                        the means, and which tasks have no score

The scores are written last: a task is done when they are there and undamaged, and the predictions
beside them are the ones they were computed from. The bytes depend on nothing but the results.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ume_models.atomic import remove_leftovers, write_atomically
from ume_models.errors import DataError, StoreError
from ume_models.mmeb.intervals import mean_interval
from ume_models.mmeb.metrics import (
    Ranking,
    decided_by_ties,
    metric_values,
    query_values,
    split_metric,
)
from ume_models.mmeb.predictions import ranking_from_line, ranking_to_line
from ume_models.mmeb.score_file import REMEDY, ScoreFile, TaskScore, read_object
from ume_models.mmeb.tasks import Task

__all__ = ["RunFolder", "TaskScore", "score_task"]

_KS = (1, 5, 10)


def score_task(
    task: Task, rankings: Sequence[Ranking], candidates: int, *, legacy: bool = False
) -> TaskScore:
    """The score of a task whose queries were ranked.

    Args:
        task: which one; its metric is the score.
        rankings: one per query.
        candidates: how many candidates the task has.
        legacy: pair grades with labels as the official metric does, see ``Ranking.gains``.

    Raises:
        DataError: there are no queries, or two have the same id.
    """
    if not rankings:
        raise DataError(f"{task.name}: no query was ranked; check the task's tables")
    if len({ranking.id for ranking in rankings}) < len(rankings):
        [(twice, _)] = Counter(ranking.id for ranking in rankings).most_common(1)
        raise DataError(f"{task.name}: two queries have the id {twice!r}; ids must be unique")
    ks = sorted({*_KS, split_metric(task.metric)[1]})
    values = metric_values(rankings, ks=ks, legacy=legacy)
    means = {name: float(value.mean()) for name, value in values.items()}
    return TaskScore(
        task=task.name,
        benchmark=task.benchmark,
        modality=task.modality,
        group=task.group,
        metric=task.metric,
        score=means[task.metric],
        interval=mean_interval(values[task.metric], task.name),
        scores=means,
        queries=len(rankings),
        candidates=candidates,
        ties=int(decided_by_ties(rankings, task.metric, legacy=legacy).sum()),
        legacy=legacy,
    )


class RunFolder:
    """The folder of a run.

    Args:
        path: need not exist before the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def settings(self) -> dict[str, Any]:
        """What the run was made with: the settings of ``run.json``, model and version among them.

        Raises:
            StoreError: ``run.json`` is missing or damaged.
        """
        path = self.path / "run.json"
        manifest = read_object(path, "it is not the folder of a run; give the one of `ume eval -o`")
        settings = manifest.get("settings")
        if not isinstance(settings, dict):
            raise StoreError(f"{path} has no settings: it is not the manifest of a run")
        told = ("model", "fingerprint", "benchmark", "package_version")
        return {**{name: manifest[name] for name in told if name in manifest}, **settings}

    def missing(self) -> dict[str, str]:
        """Why tasks have no score in the run's ``summary.json``, by name; empty without that file.

        A task may have lost its score after it was written: its data have changed, say.

        Raises:
            StoreError: ``summary.json`` is damaged.
        """
        path = self.path / "summary.json"
        if not path.is_file():
            return {}
        again = "run the same `ume eval` command again"
        try:
            told = read_object(path, again)["missing"]
            return {str(entry["task"]): str(entry["reason"]) for entry in told}
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is not the summary of a run ({error!r}); {again}") from None

    def write(self, score: TaskScore, rankings: Sequence[Ranking], *, made_from: str = "") -> None:
        """Write the results of one task; when this returns, they survive a crash.

        Scores of candidates are kept as float32.

        Args:
            score: of these rankings.
            rankings: one per query.
            made_from: digest of what they follow from, for ``made_from`` to tell later.

        Raises:
            ValueError: the score is of another number of queries, a score is not finite, or the
                task's name cannot be the name of a folder.
            OSError: the disk is full or not writable.
        """
        if score.queries != len(rankings):
            raise ValueError(f"{score.task}: a score of {score.queries}, {len(rankings)} rankings")
        values = query_values(rankings, score.metric, legacy=score.legacy)
        predictions = "".join(
            ranking_to_line(ranking, float(value))
            for ranking, value in zip(rankings, values, strict=True)
        ).encode()
        scores = ScoreFile(score, made_from, hashlib.sha256(predictions).hexdigest()).to_bytes()
        folder = self._folder(score.task)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("predictions.jsonl", "scores.json"):
            remove_leftovers(folder, name)
        write_atomically(folder / "predictions.jsonl", predictions)
        write_atomically(folder / "scores.json", scores)

    def made_from(self, task: str) -> str:
        """What ``write`` was told that the results of a task follow from; empty for nothing.

        Raises:
            StoreError: the score is missing or damaged.
        """
        return self._read(task).made_from

    def discard(self, task: str) -> None:
        """Remove the results of a task, if there are any; other files of its folder stay.

        Raises:
            ValueError: the task's name cannot be the name of a folder.
            OSError: they cannot be removed.
        """
        folder = self._folder(task)
        for name in ("scores.json", "predictions.jsonl"):  # without a score, it is not done
            (folder / name).unlink(missing_ok=True)

    def has(self, task: str) -> bool:
        """Whether there is a score of a task; what it says is not looked at."""
        return (self._folder(task) / "scores.json").is_file()

    def finished(self, task: str) -> bool:
        """Whether the results of a task are there, complete and undamaged."""
        try:
            self._lines(task)
        except StoreError:
            return False
        return True

    def scores(self) -> dict[str, TaskScore]:
        """Scores of the tasks that are done, by name, in alphabetical order.

        Raises:
            StoreError: a file of scores is damaged.
        """
        files = sorted((self.path / "tasks").glob("*/scores.json"))
        return {path.parent.name: self.score(path.parent.name) for path in files}

    def score(self, task: str) -> TaskScore:
        """The score of one task.

        Raises:
            StoreError: it is missing or damaged.
        """
        return self._read(task).score

    def rankings(self, task: str) -> list[Ranking]:
        """What was found for each query of a task, in the order of the tables.

        Raises:
            StoreError: the results are missing or damaged.
        """
        return self.rankings_and_values(task)[0]

    def values(self, task: str) -> npt.NDArray[np.float64]:
        """Value of the task's metric for each query, float64 ``[Q]``, in the order of the tables.

        Raises:
            StoreError: the results are missing or damaged.
        """
        return self.rankings_and_values(task)[1]

    def rankings_and_values(self, task: str) -> tuple[list[Ranking], npt.NDArray[np.float64]]:
        """Both at once: the file is read only once.

        Raises:
            StoreError: the results are missing or damaged.
        """
        found, values = [], []
        for number, line in enumerate(self._lines(task), 1):
            try:
                ranking, value = ranking_from_line(line)
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                path = self._folder(task) / "predictions.jsonl"
                raise StoreError(
                    f"{path}, line {number} is not a prediction ({error!r}); {REMEDY}"
                ) from None
            found.append(ranking)
            values.append(value)
        return found, np.array(values, dtype=np.float64)

    def _folder(self, task: str) -> Path:
        if task in ("", ".", "..") or "/" in task or "\\" in task:
            raise ValueError(f"{task!r} cannot be the name of a folder")
        return self.path / "tasks" / task

    def _read(self, task: str) -> ScoreFile:
        return ScoreFile.read(self._folder(task) / "scores.json")

    def _lines(self, task: str) -> list[bytes]:
        scores = self._read(task)
        path = self._folder(task) / "predictions.jsonl"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {REMEDY}") from None
        if hashlib.sha256(data).hexdigest() != scores.predictions_sha256:
            raise StoreError(f"{path} is not what the scores beside it are of; {REMEDY}")
        lines = data.splitlines()
        if len(lines) != scores.score.queries:
            raise StoreError(
                f"{path} has {len(lines)} lines for {scores.score.queries} queries; {REMEDY}"
            )
        return lines
