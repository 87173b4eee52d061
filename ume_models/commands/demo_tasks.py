"""The shipped held-out items as retrieval tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ume_models.assets import heldout
from ume_models.processing import Item, parse_item


@dataclass(frozen=True)
class DemoTask:
    """Queries, what they are ranked against, and the right answers.

    Attributes:
        name: identifies the task.
        kind: what is asked with and what is found, as in "text→image".
        queries, candidates: items; ids are unique within the task.
        relevant: ids of the candidates that answer each query.
    """

    name: str
    kind: str
    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: Sequence[Collection[str]]


def load_tasks(queries: int | None = None) -> list[DemoTask]:
    """The tasks that ship with the package.

    Args:
        queries: only so many queries of each task; None for all. Candidates are never reduced,
            which would make the task easier.

    Raises:
        UmeError: the files are missing.
    """
    return [
        DemoTask(
            task.name,
            task.kind,
            [parse_item(item, index) for index, item in enumerate(task.queries[:queries])],
            [parse_item(item, index) for index, item in enumerate(task.candidates)],
            [frozenset(ids) for ids in task.relevant[:queries]],
        )
        for task in heldout().tasks
    ]
