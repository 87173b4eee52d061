"""Scores of embeddings that another program stored: no model is needed.

Two layouts, both below one folder:

    TASK/queries.npy        float [Q, D], in the order of the task's tables
    TASK/candidates.npy     float [C, D]
    TASK/candidates.json    C names: a JSON list

    TASK_qry                what the official evaluation writes: a pickled array,
    TASK_tgt                a pickled mapping from candidate name to embedding,
    TASK_info.jsonl         and the answers of every query; needs no data root

The evaluation of PLUME has the modes of both sides in these names: TASK_gen_qry, TASK_gen_tgt,
TASK_gen_gen_info.jsonl.
Pickles are opened by a reader that knows arrays and nothing else, so they cannot run code.
Whatever would only lower the scores, such as an answer that is not among the candidates, is an
error.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, TaskData
from ume_models.mmeb.pickled_arrays import STAND_INS, plain
from ume_models.mmeb.ranking import rank_task
from ume_models.mmeb.results import RunFolder, TaskScore, score_task
from ume_models.mmeb.stored_answers import read_answers
from ume_models.mmeb.tasks import Task

_MODES = ("gen", "disc")  # of PLUME's evaluation
_UNIT = 0.01  # bfloat16 rows of unit length are off by less


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

    def not_unit_length(self) -> str:
        """What is to be said of rows that are not of unit length; empty if all of them are."""
        lengths = torch.cat([rows.norm(dim=1) for rows in (self.queries, self.candidates)])
        odd = (lengths - 1).abs() > _UNIT
        if not bool(odd.any()):
            return ""
        return (
            f"{int(odd.sum())} of {len(odd)} embeddings are not of unit length "
            f"({float(lengths.min()):.3g} to {float(lengths.max()):.3g}): candidates are ranked by "
            "inner product; normalise the rows if the model's scores are cosines"
        )


def read_stored(folder: Path, task: Task, *, answers: bool = True) -> StoredTask | None:
    """The embeddings of a task in one of the two layouts; None where there are none.

    Args:
        folder: the folder of both layouts.
        task: which one.
        answers: read the answers too, if they are there.

    Raises:
        DataError: a file is damaged, missing beside the others, or does not fit them.
    """
    own = folder / task.name
    if any((own / f"{side}.npy").is_file() for side in ("queries", "candidates")):
        return _read_arrays(own, task)
    names = {side: _official_names(folder, task, side) for side in ("qry", "tgt")}
    if any(names.values()):
        return _read_official(folder, task, names, answers)
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
            f"{task.name}: {len(stored.queries)} stored queries, {len(queries)} with answers; "
            "embeddings and answers must be of the same version, without --limit"
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


def _read_arrays(folder: Path, task: Task) -> StoredTask:
    queries, candidates = (_array(folder / f"{side}.npy") for side in ("queries", "candidates"))
    path = folder / "candidates.json"
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{task.name}: {path} cannot be read ({error}): write the candidates' names"
        ) from None
    if not isinstance(names, list) or not all(
        isinstance(name, (str, int)) and not isinstance(name, bool) for name in names
    ):
        raise DataError(f"{task.name}: {path} must be a JSON list of names")
    where = f"{task.name}: {folder}"
    return _checked(where, queries, [str(name) for name in names], candidates)


def _official_names(folder: Path, task: Task, side: str) -> list[str]:
    """Names of one side's files, without and with a mode."""
    known = [f"{task.name}_{side}", *(f"{task.name}_{mode}_{side}" for mode in _MODES)]
    return [name for name in known if (folder / name).is_file()]


def _read_official(
    folder: Path, task: Task, names_of: Mapping[str, Sequence[str]], answers: bool
) -> StoredTask:
    for found in names_of.values():
        if len(found) > 1:
            raise DataError(
                f"{task.name}: {folder} has {' and '.join(found)}: keep the files of one mode there"
            )
    # Where one side is missing, its plain name tells what was looked for.
    files = [(names_of[side] or [f"{task.name}_{side}"])[0] for side in ("qry", "tgt")]
    paths = [folder / file for file in files]
    queries, targets = map(_unpickled, paths)
    if not isinstance(queries, np.ndarray):
        raise DataError(f"{task.name}: {paths[0]} must hold an array; write it again")
    if not isinstance(targets, Mapping) or not targets:
        raise DataError(
            f"{task.name}: {paths[1]} must hold a mapping from names to embeddings; write it again"
        )
    names = [str(name) for name in targets]
    candidates = _stacked(f"{task.name}: {paths[1]}", names, list(targets.values()))
    stored = _checked(f"{task.name}: {folder}", queries, names, candidates)
    modes = [file.removeprefix(task.name).rpartition("_")[0] for file in files]  # "" or "_gen"
    path = folder / f"{task.name}{''.join(modes)}_info.jsonl"
    if not answers or not path.is_file():
        return stored
    return replace(stored, answers=read_answers(path, task, {*names}))


def _stacked(where: str, names: Sequence[str], rows: Sequence[Any]) -> np.ndarray:
    """Embeddings ``[C, D]`` of one row each."""
    for name, row in zip(names, rows, strict=True):
        if not isinstance(row, np.ndarray) or row.ndim != 1 or row.dtype.kind != "f":
            raise DataError(f"{where}: the embedding of {name!r} is not a row of floats")
        if len(row) != len(rows[0]):
            raise DataError(
                f"{where}: the embedding of {name!r} has {len(row)} columns, that of {names[0]!r} "
                f"{len(rows[0])}; embed all candidates with one model"
            )
    return np.stack(rows)


def _checked(
    where: str, queries: np.ndarray, names: list[str], candidates: np.ndarray
) -> StoredTask:
    rows = [
        _float_rows(where, side, array)
        for side, array in (("queries", queries), ("candidates", candidates))
    ]
    if len(names) != len(candidates):
        raise DataError(
            f"{where}: {len(names)} names for {len(candidates)} candidates; write them together"
        )
    if len(set(names)) < len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise DataError(f"{where}: two candidates have the name {twice!r}; names must be unique")
    if queries.shape[1] != candidates.shape[1]:
        raise DataError(
            f"{where}: queries have {queries.shape[1]} columns, candidates {candidates.shape[1]}; "
            "embed both with one model"
        )
    return StoredTask(rows[0], names, rows[1])


def _float_rows(where: str, side: str, array: np.ndarray) -> torch.Tensor:
    """An array as float32 ``[n, D]``."""
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise DataError(
            f"{where}: {side} must be float [n, D], got {array.dtype} {list(array.shape)}"
        )
    with np.errstate(over="ignore"):
        rows = np.array(array, dtype=np.float32, order="C")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{where}: row {int(np.argmin(finite))} of {side} holds NaN, infinity or more than "
            "float32 can; embed it again"
        )
    return torch.from_numpy(rows)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # numpy parses the header as Python, and may raise what that does
        raise DataError(f"{path} cannot be read ({error}): write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} holds several arrays: write one with numpy.save")
    return array


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and plain containers; everything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only arrays are read")


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as handle:
            return plain(_ArraysOnly(handle).load())
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle may raise anything
        raise DataError(
            f"{path} cannot be read ({error}): it must be a pickle of float arrays, as the "
            "official evaluation writes it"
        ) from None
