"""M-BEIR: queries, a collection, judgements and instructions in files of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Candidates, Query, ReadOptions, TaskData
from ume_models.mmeb.mbeir import MODALITIES, task_number
from ume_models.mmeb.readers.cells import (
    name_of,
    optional_path_of,
    optional_text_of,
    path_of,
    place_named,
    text_of,
)
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_INSTRUCTIONS = "instructions/query_instructions.tsv"
_AGAIN = "download the file again"
# Judgements are 0 and 1; anything that is far from it is not one.
_LARGEST_GRADE = 100


def read(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Queries in the order of their file, candidates in the order of the collection.

    The official evaluation draws one of four instructions for every query; here the first is used,
    so that results can be repeated. Texts are brought into its form: without surrounding quotes, a
    capital first, a full stop at the end. Answers that are not in the task's own collection do not
    count, unless a query has no other: the judgements of OVEN and InfoSeek name each other's.

    Args:
        task: a task of ``mbeir.MBEIR``.
        root: the folder with ``M-BEIR``, or that folder itself.
        options: ``limit`` counts; there is one version of labels and wording.

    Raises:
        DataError: a file is missing, or a line of one is not in its layout.
    """
    name, split = task.source.config, task.source.split
    queries_file = f"query/{split}/mbeir_{name}_{split}.jsonl"
    folder = _folder(task, root, queries_file)
    judgements_file = folder / f"qrels/{split}/mbeir_{name}_{split}_qrels.txt"
    answers = _judgements(_existing(judgements_file))
    instructions_file = _existing(folder / _INSTRUCTIONS)
    instructions = _instructions(instructions_file)
    pool_file = _pool_file(folder, str(name))
    collection = _Collection(folder, pool_file, MODALITIES[task_number(task.name)][1])
    reachable = {*collection.names}

    asked, found, _ = MODALITIES[task_number(task.name)]
    queries: list[Query] = []
    for row, at in _rows(folder / queries_file):
        if options.limit is not None and len(queries) == options.limit:
            break
        with place_named(at, _AGAIN):
            qid = name_of(row, "qid")
            worded = "text" in (optional_text_of(row, "query_modality") or asked)
            text = (text_of if worded else optional_text_of)(row, "query_txt")
            path = _picture_of(row, "query_img_path", "query_modality", asked)
        key = (qid.partition(":")[0], asked, found)
        if key not in instructions:
            raise DataError(
                f"{instructions_file} has no instruction for data set {key[0]}, {asked} to "
                f"{found}, which {at} asks for: download the file again"
            )
        images = (folder / path,) if path else ()
        judged = answers.get(qid, ())
        relevant = tuple(did for did in judged if did in reachable) or tuple(judged)
        item = Item(_sentence(f"{_sentence(instructions[key])} {text}"), images, id=qid)
        queries.append(Query(item, relevant, labels=relevant))
    files = (folder / queries_file, pool_file, judgements_file, instructions_file)
    return TaskData(task, queries, collection, files)


class _Collection(Candidates):
    """A collection of candidates; their items are made when asked for."""

    def __init__(self, folder: Path, file: Path, found: str) -> None:
        self._folder = folder
        contents: dict[str, tuple[str, str]] = {}
        clashes: dict[str, None] = {}
        for row, at in _rows(file):
            with place_named(at, _AGAIN):
                did = name_of(row, "did")
                path = _picture_of(row, "img_path", "modality", found)
                content = (optional_text_of(row, "txt"), path)
            if contents.setdefault(did, content) != content:
                clashes[did] = None
        self.names = list(contents)
        self.clashes = list(clashes)
        self._contents = list(contents.values())

    def item(self, position: int) -> Item:
        text, path = self._contents[position]
        images = (self._folder / path,) if path else ()
        return Item(_sentence(text), images, id=self.names[position])


def _folder(task: Task, root: Path, file: str) -> Path:
    """The folder of the benchmark: where the queries of the task are."""
    places = [root / place for place in task.media]
    for place in places:
        if (place / file).is_file():
            return place.absolute()
    looked = " and no ".join(str(place / file) for place in places)
    raise DataError(
        f"there is no {looked}: download {task.source.repository} and unpack its images"
    )


def _pool_file(folder: Path, name: str) -> Path:
    """The collection of a task. MSCOCO has separate ones for validation and test."""
    plain = folder / f"cand_pool/local/mbeir_{name}_cand_pool.jsonl"
    separate = folder / f"cand_pool/local/mbeir_{name}_test_cand_pool.jsonl"
    return separate if separate.is_file() else _existing(plain)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no {path}: download the file from TIGER-Lab/M-BEIR")
    return path


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a file of JSON lines, and how to call each in messages."""
    for line, at in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{at} is not JSON ({error}): download the file again") from None
        if not isinstance(row, dict):
            raise DataError(f"{at} is not a JSON object: download the file again")
        yield row, at


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not empty."""
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield line, f"{path}, line {number}"
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}): download the file again") from None


def _picture_of(row: Mapping[str, Any], column: str, modality: str, of_task: str) -> str:
    """The path of a row's picture, which must be there if the row's modality says so.

    ``of_task`` is the modality of rows that do not say theirs.
    """
    shown = "image" in (optional_text_of(row, modality) or of_task)
    return path_of(row, column) if shown else optional_path_of(row, column)


def _judgements(path: Path) -> dict[str, list[str]]:
    """Answers of every query. Columns: query, 0, candidate, relevance, and number of the task."""
    answers: dict[str, list[str]] = {}
    for line, at in _lines(path):
        columns = line.split()
        try:
            query, _, candidate, relevance = columns[0], columns[1], columns[2], int(columns[3])
            if not 0 <= relevance <= _LARGEST_GRADE:
                raise ValueError(relevance)
        except (IndexError, ValueError):
            raise DataError(
                f"{at} does not have the columns query, 0, candidate, relevance (0 to "
                f"{_LARGEST_GRADE}): {_AGAIN}"
            ) from None
        of_query = answers.setdefault(query, [])
        if relevance > 0 and candidate not in of_query:
            of_query.append(candidate)
    return answers


def _instructions(path: Path) -> dict[tuple[str, str, str], str]:
    """The first instruction by number of the data set and modalities of the two sides.

    Columns below a header: modality of queries, of candidates, name and number of the data set,
    and the instructions, of which some may be empty.
    """
    found = {}
    for number, (line, _) in enumerate(_lines(path)):
        columns = line.strip().split("\t")
        wordings = [wording for wording in columns[4:] if wording.strip()]
        if number > 0 and wordings:
            found[columns[3], columns[0], columns[1]] = wordings[0]
    return found


def _sentence(text: str) -> str:
    """Without surrounding space and quotes, the first letter large, ending as a sentence ends."""
    text = text.replace("\r", "").strip().strip('"')
    if not text:
        return text
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."
