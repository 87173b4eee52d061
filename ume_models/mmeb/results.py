"""Results of a run on disk: per task its score, and what was found for each query.

    RUN/run.json                            what was evaluated, and with which settings
    RUN/tasks/TASK/predictions.jsonl        one line per query, in the order of the tables
    RUN/tasks/TASK/scores.json              a ``TaskScore``, and the SHA-256 of the predictions

The scores are written last: a task is done when they are there and the predictions beside them
are the ones they were computed from. The bytes depend on nothing but the results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ume_models.atomic import remove_leftovers, write_atomically
from ume_models.errors import DataError, StoreError
from ume_models.mmeb.intervals import Interval, mean_interval
from ume_models.mmeb.metrics import (
    Ranking,
    decided_by_ties,
    metric_values,
    query_values,
    split_metric,
)
from ume_models.mmeb.predictions import ranking_from_json, ranking_to_line
from ume_models.mmeb.tasks import Task

FORMAT = "ume-task-score"
FORMAT_VERSION = 1
_KS = (1, 5, 10)
_REMEDY = "delete the task's folder and run the same `ume eval` command again"


@dataclass(frozen=True)
class TaskScore:
    """How well a task went.

    Attributes:
        task: its name.
        benchmark: "MMEB-v2", "MMEB-v1" or "M-BEIR".
        modality: "image", "video" or "visdoc".
        group: such as "I-CLS".
        metric: the measure that is its score, such as "hit@1".
        score: mean of it over the queries, from 0 to 1.
        interval: bootstrap interval of the score (95 %).
        scores: means of all measures, by name.
        queries: how many there were.
        candidates: how many the task has.
        ties: queries whose value depends on the order of candidates with equal scores.
        legacy: whether grades were paired with labels as in the official metric.
    """

    task: str
    benchmark: str
    modality: str
    group: str
    metric: str
    score: float
    interval: Interval
    scores: Mapping[str, float]
    queries: int
    candidates: int
    ties: int
    legacy: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields under their names, as JSON has them."""
        return {**asdict(self), "interval": list(self.interval), "scores": dict(self.scores)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskScore:
        """Inverse of ``to_json``; further keys are ignored.

        Raises:
            KeyError, TypeError, ValueError: fields are missing or ill-typed.
        """
        low, high = value["interval"]
        return cls(
            task=str(value["task"]),
            benchmark=str(value["benchmark"]),
            modality=str(value["modality"]),
            group=str(value["group"]),
            metric=str(value["metric"]),
            score=float(value["score"]),
            interval=Interval(float(low), float(high)),
            scores={str(name): float(mean) for name, mean in dict(value["scores"]).items()},
            queries=int(value["queries"]),
            candidates=int(value["candidates"]),
            ties=int(value["ties"]),
            legacy=bool(value["legacy"]),
        )


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
        ids = [ranking.id for ranking in rankings]
        twice = next(id for id in ids if ids.count(id) > 1)
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
        manifest = _read_object(
            path, "it is not the folder of a run; give the one of `ume eval -o`"
        )
        settings = manifest.get("settings")
        if not isinstance(settings, dict):
            raise StoreError(f"{path} has no settings: it is not the manifest of a run")
        told = ("model", "fingerprint", "benchmark", "package_version")
        return {**{name: manifest[name] for name in told if name in manifest}, **settings}

    def write(self, score: TaskScore, rankings: Sequence[Ranking]) -> None:
        """Write the results of one task; when this returns, they survive a crash.

        Scores of candidates are kept as float32.

        Args:
            score: of these rankings.
            rankings: one per query.

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
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **score.to_json(),
            "predictions_sha256": hashlib.sha256(predictions).hexdigest(),
        }
        scores = json.dumps(content, indent=1, allow_nan=False) + "\n"
        folder = self._folder(score.task)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("predictions.jsonl", "scores.json"):
            remove_leftovers(folder, name)
        write_atomically(folder / "predictions.jsonl", predictions)
        write_atomically(folder / "scores.json", scores.encode())

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
        return self._read_score(task)[0]

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
        return np.array([float(line["value"]) for line in self._predictions(task)])

    def rankings_and_values(self, task: str) -> tuple[list[Ranking], npt.NDArray[np.float64]]:
        """Both at once: the file is read only once.

        Raises:
            StoreError: the results are missing or damaged.
        """
        lines = self._predictions(task)
        values = np.array([float(line["value"]) for line in lines])
        return [ranking_from_json(line) for line in lines], values

    def _folder(self, task: str) -> Path:
        if task in ("", ".", "..") or "/" in task or "\\" in task:
            raise ValueError(f"{task!r} cannot be the name of a folder")
        return self.path / "tasks" / task

    def _read_score(self, task: str) -> tuple[TaskScore, str]:
        path = self._folder(task) / "scores.json"
        content = _read_object(path, f"the task is not done; {_REMEDY}")
        if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path} is not of format {FORMAT} version {FORMAT_VERSION}; "
                f"update ume, or {_REMEDY}"
            )
        try:
            return TaskScore.from_json(content), str(content["predictions_sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); {_REMEDY}") from None

    def _predictions(self, task: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines(task)]

    def _lines(self, task: str) -> list[bytes]:
        _, digest = self._read_score(task)
        path = self._folder(task) / "predictions.jsonl"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {_REMEDY}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{path} is not what the scores beside it are of; {_REMEDY}")
        return data.splitlines()


def _read_object(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object, with the reason and a remedy where it cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is missing: {missing}") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); {_REMEDY}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: not a JSON object; {_REMEDY}")
    return value
