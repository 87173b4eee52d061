"""The means of a run: per group, per modality and overall, over the tasks that ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ume_models.errors import StoreError
from ume_models.mmeb.intervals import Interval, percentile_interval, resampled_means
from ume_models.mmeb.results import TaskScore
from ume_models.mmeb.tasks import Task


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of the scores of tasks.

    Attributes:
        value: the mean over the tasks that ran.
        interval: bootstrap interval (95 %), queries resampled within each task.
        tasks: how many ran.
        of: how many were asked for.
    """

    value: float
    interval: Interval
    tasks: int
    of: int


@dataclass(frozen=True)
class Missing:
    """A task without a score.

    Attributes:
        task: its name.
        reason: why.
    """

    task: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """A run at a glance.

    Attributes:
        settings: what the run was made with.
        tasks: scores of the tasks that ran, in the order of the benchmark's table.
        missing: tasks that were asked for and did not run; they are in no mean.
        groups: mean of each group of which a task ran, in the order of the table.
        modalities: the same per modality.
        overall: mean over all tasks that ran; None if none did.
    """

    settings: Mapping[str, Any]
    tasks: Sequence[TaskScore]
    missing: Sequence[Missing]
    groups: Mapping[str, Mean]
    modalities: Mapping[str, Mean]
    overall: Mean | None

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON has it."""
        return {
            "settings": dict(self.settings),
            "overall": None if self.overall is None else _mean_to_json(self.overall),
            "modalities": {name: _mean_to_json(mean) for name, mean in self.modalities.items()},
            "groups": {name: _mean_to_json(mean) for name, mean in self.groups.items()},
            "tasks": [score.to_json() for score in self.tasks],
            "missing": [asdict(missing) for missing in self.missing],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        """Inverse of ``to_json``.

        Raises:
            StoreError: it is not the JSON of a summary.
        """
        try:
            overall = value["overall"]
            return cls(
                settings=dict(value["settings"]),
                tasks=[TaskScore.from_json(score) for score in value["tasks"]],
                missing=[Missing(**missing) for missing in value["missing"]],
                groups={name: _mean_from_json(m) for name, m in value["groups"].items()},
                modalities={name: _mean_from_json(m) for name, m in value["modalities"].items()},
                overall=None if overall is None else _mean_from_json(overall),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"not the summary of a run ({error!r}): write it again") from None


def summarise(
    tasks: Sequence[Task],
    scores: Mapping[str, TaskScore],
    values: Mapping[str, npt.NDArray[np.float64]],
    missing: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Summary:
    """Means over the tasks that ran. A task without a score is listed, never counted as zero.

    Args:
        tasks: the tasks that were asked for, in the order of the table.
        scores: of those that ran, by name; others are ignored.
        values: value of the task's metric per query, ``[Q]``, for each of ``scores``.
        missing: why tasks have no score, by name, where that is known.
        settings: what the run was made with.

    Raises:
        ValueError: values of a task are missing, or they are not those of its score.
    """
    ran = [scores[task.name] for task in tasks if task.name in scores]
    for score in ran:
        if score.task not in values or len(values[score.task]) != score.queries:
            raise ValueError(f"{score.task}: {score.queries} values are needed, one per query")
    # Drawn once per task: its group, its modality and the whole see the same samples.
    drawn = {score.task: resampled_means(values[score.task], score.task) for score in ran}
    reasons = missing or {}

    def mean(asked: Sequence[Task]) -> Mean | None:
        names = [task.name for task in asked if task.name in drawn]
        if not names:
            return None
        return Mean(
            value=float(np.mean([scores[name].score for name in names])),
            interval=percentile_interval(np.mean([drawn[name] for name in names], axis=0)),
            tasks=len(names),
            of=len(asked),
        )

    def means(labels: Sequence[str]) -> dict[str, Mean]:
        found = {
            label: mean([task for task, own in zip(tasks, labels, strict=True) if own == label])
            for label in dict.fromkeys(labels)
        }
        return {label: value for label, value in found.items() if value is not None}

    return Summary(
        settings=dict(settings or {}),
        tasks=ran,
        missing=[
            Missing(task.name, reasons.get(task.name, "was not run"))
            for task in tasks
            if task.name not in scores
        ],
        groups=means([task.group for task in tasks]),
        modalities=means([task.modality for task in tasks]),
        overall=mean(tasks),
    )


def _mean_to_json(mean: Mean) -> dict[str, Any]:
    return {**asdict(mean), "interval": list(mean.interval)}


def _mean_from_json(value: Mapping[str, Any]) -> Mean:
    low, high = value["interval"]
    return Mean(float(value["value"]), Interval(low, high), int(value["tasks"]), int(value["of"]))
