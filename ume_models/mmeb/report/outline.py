"""The order in which results are told: modalities, their groups, the groups' tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ume_models.errors import DataError
from ume_models.mmeb.benchmarks import benchmark
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.results import TaskScore
from ume_models.mmeb.summary import Mean, Missing, Summary
from ume_models.mmeb.tasks import Task

_MODALITIES = {"image": "Image", "video": "Video", "visdoc": "Visual documents"}
_GROUPS = {
    "I-CLS": "Image classification",
    "I-QA": "Visual question answering",
    "I-RET": "Image retrieval",
    "I-VG": "Visual grounding",
    "V-CLS": "Video classification",
    "V-RET": "Video retrieval",
    "V-MRET": "Moment retrieval",
    "V-QA": "Video question answering",
    "VisDoc-OOD": "Out-of-distribution pages",
}


class Placed(Protocol):
    """What knows where it belongs: scores and comparisons of tasks."""

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def modality(self) -> str:
        """Its modality."""
        ...

    @property
    def group(self) -> str:
        """Its group."""
        ...


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True)
class Group:
    """A group of tasks.

    Attributes:
        code: as tables of papers have it, such as "I-CLS".
        title: in words.
        mean: over its tasks that ran; None if none did.
        of: how many tasks it has.
        scores: of the tasks that ran.
    """

    code: str
    title: str
    mean: Mean | None
    of: int
    scores: Sequence[TaskScore]


@dataclass(frozen=True)
class Part:
    """A modality.

    Attributes:
        code: "image", "video" or "visdoc".
        title: in words.
        mean: over its tasks that ran; None if none did.
        of: how many tasks it has.
        groups: its groups.
    """

    code: str
    title: str
    mean: Mean | None
    of: int
    groups: Sequence[Group]


def outline(summary: Summary) -> list[Part]:
    """The parts of a summary, those without a single score included."""
    table = tasks_of(summary.settings)
    scores = {score.task: score for score in summary.tasks}
    # Missing tasks are known by name only; where they belong stands in the benchmark's table.
    places: dict[str, dict[str, list[str]]] = {}
    for name in in_order([*scores, *(missing.task for missing in summary.missing)], table):
        place = scores.get(name) or table.get(name)
        if place is not None:
            places.setdefault(place.modality, {}).setdefault(place.group, []).append(name)
    return [
        Part(
            code=modality,
            title=modality_title(modality),
            mean=summary.modalities.get(modality),
            of=sum(map(len, groups.values())),
            groups=[
                Group(
                    code=group,
                    title=group_title(group),
                    mean=summary.groups.get(group),
                    of=len(names),
                    scores=[scores[name] for name in names if name in scores],
                )
                for group, names in groups.items()
            ],
        )
        for modality, groups in places.items()
    ]


def grouped(items: Iterable[P]) -> list[tuple[str, list[P]]]:
    """Items by group in the order of MMEB-v2, what it does not have after that by name."""
    order = {group: place for place, group in enumerate(dict.fromkeys(t.group for t in MMEB_V2))}
    names = {task.name: place for place, task in enumerate(MMEB_V2)}
    found: dict[str, list[P]] = {}
    for item in sorted(
        items,
        key=lambda item: (
            order.get(item.group, len(order)),
            item.group,
            names.get(item.task, len(names)),
            item.task,
        ),
    ):
        found.setdefault(item.group, []).append(item)
    return list(found.items())


def tasks_of(settings: Mapping[str, Any]) -> dict[str, Task]:
    """Tasks of the benchmark that a run is of, by name; empty for an unknown one."""
    try:
        return {task.name: task for task in benchmark(str(settings.get("benchmark")))}
    except DataError:
        return {}


def in_order(names: Sequence[str], table: Mapping[str, Task]) -> list[str]:
    """Names in the order of the table, the others after them as they come."""
    order = {name: place for place, name in enumerate(table)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def reason(missing: Missing) -> str:
    """Why a task is missing, without its name, which stands beside it in every form."""
    return re.sub(rf"(^|: ){re.escape(missing.task)}: ", r"\1", missing.reason)


def modality_title(modality: str) -> str:
    """A modality in words."""
    return _MODALITIES.get(modality, modality)


def group_title(group: str) -> str:
    """A group in words; its own name where there are none."""
    return _GROUPS.get(group, group)
