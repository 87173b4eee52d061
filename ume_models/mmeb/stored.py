"""Scores of embeddings that another program stored: no model is needed.

Two layouts, both below one folder:

    TASK/queries.npy        float [Q, D], in the order of the task's tables
    TASK/candidates.npy     float [C, D]
    TASK/candidates.json    C names: a JSON list

    TASK_qry                what the official evaluation writes: a pickled array,
    TASK_tgt                a pickled mapping from candidate name to embedding,
    TASK_info.jsonl         and the answers of every query; needs no data root

Pickles are opened by a reader that knows arrays and nothing else, so they cannot run code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, TaskData
from ume_models.mmeb.ranking import rank_task
from ume_models.mmeb.results import RunFolder, TaskScore, score_task
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item


@dataclass(frozen=True)
class StoredTask:
    """Embeddings of a task.

    Attributes:
        queries: float32 ``[Q, D]``.
        names: names of the candidates.
        candidates: float32 ``[C, D]``.
        answers: the queries with their answers where the folder has them, else None.
    """

    queries: torch.Tensor
    names: Sequence[str]
    candidates: torch.Tensor
    answers: Sequence[Query] | None = None


def read_stored(folder: Path, task: Task) -> StoredTask | None:
    """The embeddings of a task in one of the two layouts; None where there are none.

    Raises:
        DataError: a file is damaged, missing beside the others, or does not fit them.
    """
    own = folder / task.name
    if (own / "queries.npy").is_file():
        return _read_arrays(own)
    if (folder / f"{task.name}_qry").is_file():
        return _read_official(folder, task)
    return None


def score_stored(
    stored: StoredTask,
    task: Task,
    data: TaskData | None,
    results: RunFolder,
    *,
    top: int = 100,
    legacy_ndcg: bool = False,
) -> TaskScore:
    """Rank, score and write the results of one task.

    Args:
        stored: its embeddings; normalise them first if the model's scores are cosines.
        task: which one.
        data: its tables; None to take the answers stored with the embeddings.
        results: where to write.
        top: places of each ranking that are kept and scored.
        legacy_ndcg: pair graded relevance with labels as the official metric does.

    Raises:
        DataError: queries or candidates do not fit the task.
    """
    queries = data.queries if data is not None else stored.answers
    if queries is None:
        raise DataError(f"{task.name}: answers are needed: give the data root with --data")
    if len(queries) != len(stored.queries):
        raise DataError(
            f"{task.name}: {len(stored.queries)} stored queries, {len(queries)} in the tables; "
            "embeddings and tables must be of the same version, without --limit"
        )
    if data is not None:
        _check_names(task, data, stored.names)
    rankings = rank_task(task, queries, stored.queries, stored.names, stored.candidates, top=top)
    score = score_task(task, rankings, len(stored.names), legacy=legacy_ndcg)
    results.write(score, rankings)
    return score


def _check_names(task: Task, data: TaskData, names: Sequence[str]) -> None:
    lacking = sorted({*data.candidates.names} - {*names})
    if lacking:
        raise DataError(
            f"{task.name}: {len(lacking)} candidates of the tables have no stored embedding, such "
            f"as {lacking[0]!r}"
        )
    more = sorted({*names} - {*data.candidates.names})
    if more and task.ranking == "global":
        raise DataError(
            f"{task.name}: {len(more)} stored candidates are not in the tables, such as "
            f"{more[0]!r}; they would make the task harder than it is"
        )


def _read_arrays(folder: Path) -> StoredTask:
    queries, candidates = (_array(folder / f"{side}.npy") for side in ("queries", "candidates"))
    path = folder / "candidates.json"
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): write the candidates' names") from None
    if not isinstance(names, list) or not all(isinstance(name, (str, int)) for name in names):
        raise DataError(f"{path} must be a JSON list of names")
    return _checked(folder, queries, [str(name) for name in names], candidates, None)


def _read_official(folder: Path, task: Task) -> StoredTask:
    queries = _unpickled(folder / f"{task.name}_qry")
    targets = _unpickled(folder / f"{task.name}_tgt")
    if not isinstance(queries, np.ndarray) or not isinstance(targets, dict) or not targets:
        raise DataError(f"{folder}: {task.name}_qry must hold an array, {task.name}_tgt a mapping")
    names = [str(name) for name in targets]
    candidates = np.stack([np.asarray(row) for row in targets.values()])
    path = folder / f"{task.name}_info.jsonl"
    answers = None
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            answers = [
                _answer(json.loads(line), number, task)
                for number, line in enumerate(filter(None, lines))
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not as the official evaluation writes it: {error!r}"
            ) from None
    return _checked(folder, queries, names, candidates, answers)


def _answer(info: dict[str, Any], number: int, task: Task) -> Query:
    labels = info["label_name"] if isinstance(info["label_name"], list) else [info["label_name"]]
    grades = info.get("rel_scores")
    if grades is None:
        labels = list(dict.fromkeys(labels))
    return Query(
        item=Item(id=str(number)),
        relevant=tuple(map(str, labels)),
        grades=None if grades is None else tuple(map(float, grades)),
        candidates=tuple(map(str, info["cand_names"])) if task.ranking == "local" else (),
        labels=tuple(labels),
    )


def _checked(
    where: Path,
    queries: np.ndarray,
    names: list[str],
    candidates: np.ndarray,
    answers: Sequence[Query] | None,
) -> StoredTask:
    for side, array in (("queries", queries), ("candidates", candidates)):
        if array.ndim != 2 or array.dtype.kind != "f" or not len(array):
            raise DataError(
                f"{where}: {side} must be float [n, D], got {array.dtype} {list(array.shape)}"
            )
    if queries.shape[1] != candidates.shape[1]:
        raise DataError(
            f"{where}: queries have {queries.shape[1]} columns, candidates {candidates.shape[1]}"
        )
    if len(names) != len(candidates):
        raise DataError(f"{where}: {len(names)} names for {len(candidates)} candidates")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: two candidates have the name {twice!r}; names must be unique")
    rows = [torch.from_numpy(np.array(array, dtype=np.float32)) for array in (queries, candidates)]
    return StoredTask(rows[0], names, rows[1], answers)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): write it with numpy.save") from None
    return np.asarray(array)


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and plain containers; every other class is refused."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".", 1)[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only arrays are read")


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as handle:
            return _ArraysOnly(handle).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
