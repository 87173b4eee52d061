"""Rankings as lines of JSON, under the names that the official evaluation uses."""

from __future__ import annotations

import json
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


def ranking_from_json(fields: Mapping[str, Any]) -> Ranking:
    """Inverse of ``ranking_to_line``, from the parsed line.

    Raises:
        KeyError, TypeError, ValueError: fields are missing or do not fit each other.
    """
    grades = fields["rel_scores"]
    return Ranking(
        id=fields["id"],
        prediction=tuple(fields["prediction"]),
        scores=tuple(np.array(fields["scores"], dtype=np.float32).tolist()),
        relevant=tuple(fields["relevant"] if "relevant" in fields else map(str, fields["label"])),
        grades=None if grades is None else tuple(grades),
        labels=tuple(fields["label"]),
    )


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
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}, line {number + 1} is not a prediction of the official evaluation "
                f"({error!r}): write the file again"
            ) from None
        rankings.append(ranking)
    return rankings
