"""The answers of every query, as the official evaluation leaves them beside its embeddings."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_HIGHEST_GRADE = 100  # gains are 2^grade
_REMEDY = "write the file again together with the embeddings, or give the data root with --data"


def read_answers(path: Path, task: Task, names: Container[str]) -> list[Query]:
    """The queries of ``TASK_info.jsonl``, without contents; their ids are numbers from 0.

    A query whose answer could not be found would count as a wrong one, so it is an error.

    Args:
        path: the file.
        task: says whether queries have lists of their own.
        names: the candidates that have embeddings.

    Raises:
        DataError: a line is not an answer, or it names a candidate that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{task.name}: {path} cannot be read ({error}): {_REMEDY}") from None
    queries: list[Query] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                queries.append(_answer(json.loads(line), str(len(queries)), task, names))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{task.name}: {path}, line {number}: {error}; {_REMEDY}") from None
    return queries


def _answer(info: Any, id: str, task: Task, names: Container[str]) -> Query:
    if not isinstance(info, dict):
        raise ValueError("not a JSON object")
    given = info.get("label_name")
    labels = _names("label_name", given if isinstance(given, list) else [given], names)
    grades = info.get("rel_scores")
    if grades is None:
        labels = list(dict.fromkeys(labels))
    else:
        _check_grades(grades, labels)
        judged = [pair for pair in zip(labels, grades, strict=True) if pair[1] > 0]
        if not judged:  # a grade of zero is no answer
            raise ValueError("all rel_scores are 0, so the query has no answer")
        labels, grades = [label for label, _ in judged], [grade for _, grade in judged]
    own: list[str | int] = []
    if task.ranking == "local":
        own = _names("cand_names", info.get("cand_names"), names)
        if not {*map(str, own)} & {*map(str, labels)}:
            raise ValueError(f"none of label_name is in cand_names, {labels[0]!r} for one")
    return Query(
        item=Item(id=id),
        relevant=tuple(dict.fromkeys(map(str, labels))),
        grades=None if grades is None else tuple(map(float, grades)),
        candidates=tuple(map(str, own)),
        labels=tuple(labels),
    )


def _names(field: str, given: Any, known: Container[str]) -> list[str | int]:
    """Names of candidates as the file has them."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{field} must be a list of names, and not an empty one")
    for name in given:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise ValueError(f"{field} has {name!r}, which is no name of a candidate")
        if str(name) not in known:
            raise ValueError(f"{field} has {name!r}, which is not among the stored candidates")
    return given


def _check_grades(grades: Any, labels: Sequence[str | int]) -> None:
    if not isinstance(grades, list) or len(grades) != len(labels):
        raise ValueError(f"rel_scores must be a list of {len(labels)} numbers, one per label")
    for grade in grades:
        number = isinstance(grade, (int, float)) and not isinstance(grade, bool)
        if not number or not 0 <= grade <= _HIGHEST_GRADE:
            raise ValueError(f"rel_scores has {grade!r}; grades are 0 … {_HIGHEST_GRADE}")
    if len({*map(str, labels)}) < len(labels):
        raise ValueError("label_name has a name twice, with a grade each")
