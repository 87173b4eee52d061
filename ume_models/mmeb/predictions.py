"""Rankings as lines of JSON, under the names that the official evaluation uses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ume_models.errors import StoreError
from ume_models.mmeb.metrics import Ranking


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


def _list_of(types: tuple[type, ...], fields: Mapping[str, Any], name: str) -> list[Any]:
    return [_as(types, entry, name) for entry in _as(list, fields[name], name)]


def _as(types: type | tuple[type, ...], value: Any, name: str) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name!r} has a {type(value).__name__}")
    return value


def read_official_predictions(path: str | Path) -> list[Ranking]:
    """Rankings that the official evaluation wrote to ``TASK_pred.jsonl``.

    Its lines have neither ids nor scores: the queries are numbered from 0.

    Raises:
        StoreError: the file is missing, or a line is not as that evaluation writes it.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path} is missing; give a TASK_pred.jsonl of the official evaluation")
    rankings = []
    for number, line in enumerate(filter(None, path.read_bytes().split(b"\n"))):
        try:
            fields = json.loads(line)
            label, grades = fields["label"], fields.get("rel_scores")
            labels = tuple(label) if isinstance(label, list) else (label,)
            ranking = Ranking(
                id=str(number),
                prediction=tuple(map(str, fields["prediction"])),
                scores=(),
                relevant=tuple(map(str, labels if grades else dict.fromkeys(labels))),
                grades=None if grades is None else tuple(grades),
                labels=labels,
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{path}, line {number + 1} is not a prediction of the official evaluation "
                f"({error!r}): write the file again"
            ) from None
        rankings.append(ranking)
    return rankings
