"""``scores.json`` of a task: its score, what that was made from, and digests that tell damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ume_models.errors import StoreError
from ume_models.mmeb.intervals import Interval

FORMAT = "ume-task-score"
FORMAT_VERSION = 1
REMEDY = "delete the task's folder and run the same `ume eval` command again"
_DIGEST = "sha256"


@dataclass(frozen=True)
class TaskScore:
    """How well a task went.

    Attributes:
        task: its name.
        benchmark: its name.
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


@dataclass(frozen=True)
class ScoreFile:
    """What ``scores.json`` holds.

    Attributes:
        score: the score.
        made_from: digest of what the task's results follow from; empty where none was given.
        predictions_sha256: SHA-256 of the ``predictions.jsonl`` beside it, in hexadecimal digits.
    """

    score: TaskScore
    made_from: str
    predictions_sha256: str

    def to_bytes(self) -> bytes:
        """The file; the same bytes for the same content.

        Raises:
            ValueError: a number is not finite.
        """
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **self.score.to_json(),
            "made_from": self.made_from,
            "predictions_sha256": self.predictions_sha256,
        }
        content[_DIGEST] = _digest(content)
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> ScoreFile:
        """Inverse of ``to_bytes``. The task must be the one that the file's folder is named after.

        Raises:
            StoreError: the file is missing, damaged, edited, or a copy of another task's.
        """
        content = read_object(path, f"the task is not done; {REMEDY}")
        if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path} is not of format {FORMAT} version {FORMAT_VERSION}; "
                f"update ume, or {REMEDY}"
            )
        try:
            found = cls(
                TaskScore.from_json(content),
                str(content["made_from"]),
                str(content["predictions_sha256"]),
            )
            told = content.pop(_DIGEST)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); {REMEDY}") from None
        if told != _digest(content):
            raise StoreError(
                f"{path} is damaged: it does not fit the checksum that it holds; {REMEDY}"
            )
        if found.score.task != path.parent.name:
            raise StoreError(f"{path} is the score of {found.score.task}; {REMEDY}")
        return found


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object of a run's folder.

    Args:
        path: the file.
        missing: what it means that there is none, and what to do about it.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is missing: {missing}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}); {REMEDY}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: not a JSON object; {REMEDY}")
    return value


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content without its spacing; numbers in the shortest digits, as in files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
