"""Rankings as lines of JSON, under the names that the official evaluation uses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ume_models.mmeb.dataset import TaskData
from ume_models.mmeb.metrics import Ranking

_BYTES_BESIDE_NAME = 8  # of a candidate: quotes and commas, and a score of four digits or more


def ranking_to_line(ranking: Ranking, value: float) -> str:
    """One line of ``predictions.jsonl``, its end included.

    Scores are kept as float32, in the shortest digits that give the same number again.

    Args:
        ranking: what was found for a query.
        value: the task's metric for that query.

    Raises:
        ValueError: a score or the value is not finite.
    """
    fields: dict[str, Any] = {
        "id": ranking.id,
        "prediction": list(ranking.prediction),
        "scores": [float(str(score)) for score in np.asarray(ranking.scores, dtype=np.float32)],
        "label": list(ranking.labels),
        "rel_scores": None if ranking.grades is None else list(ranking.grades),
        "value": value,
    }
    if ranking.relevant != tuple(map(str, ranking.labels)):
        fields["relevant"] = list(ranking.relevant)
    # Pure ASCII: tables may hold texts that UTF-8 cannot, and ends of lines of other kinds.
    return json.dumps(fields, allow_nan=False) + "\n"


def ranking_from_line(line: str | bytes) -> tuple[Ranking, float]:
    """Inverse of ``ranking_to_line``: the ranking, and the metric's value.

    Raises:
        KeyError, TypeError, ValueError, OverflowError, RecursionError: the line is not JSON, fields
            are missing or of another type, or they do not fit each other.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    names, numbers = (str,), (int, float)
    grades, labels = fields["rel_scores"], _list_of((str, int), fields, "label")
    ranking = Ranking(
        id=_as(str, fields["id"], "id"),
        prediction=tuple(_list_of(names, fields, "prediction")),
        scores=tuple(np.array(_list_of(numbers, fields, "scores"), dtype=np.float32).tolist()),
        relevant=tuple(
            _list_of(names, fields, "relevant") if "relevant" in fields else map(str, labels)
        ),
        grades=None if grades is None else tuple(_list_of(numbers, fields, "rel_scores")),
        labels=tuple(labels),
    )
    value = _as((int, float), fields["value"], "value")
    if not all(map(math.isfinite, (value, *ranking.scores, *(ranking.grades or ())))):
        raise ValueError("a number is not finite")
    return ranking, float(value)


def least_prediction_bytes(data: TaskData, top: int) -> int:
    """Bytes that ``predictions.jsonl`` of a task takes at least, by the names it will hold.

    Args:
        data: the task.
        top: places that are kept of each ranking.
    """
    names = data.candidates.names
    shortest = min(map(len, names), default=0) + _BYTES_BESIDE_NAME
    whole = len(names) if data.task.ranking == "global" else None
    return sum(
        min(top, len(query.candidates) if whole is None else whole) * shortest
        for query in data.queries
    )


def _list_of(types: tuple[type, ...], fields: Mapping[str, Any], name: str) -> list[Any]:
    return [_as(types, entry, name) for entry in _as(list, fields[name], name)]


def _as(types: type | tuple[type, ...], value: Any, name: str) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name!r} has a {type(value).__name__}")
    return value
