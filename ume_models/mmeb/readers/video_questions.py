"""Questions about videos with answers to choose from, which each data set words differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.frames import FrameFolders
from ume_models.mmeb.locate import locate, media_folder
from ume_models.mmeb.readers.cells import name_of, row_named, text_of, texts_of
from ume_models.mmeb.readers.mentions import Mentions
from ume_models.mmeb.table import Table
from ume_models.mmeb.tables import open_table
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item

_Row: TypeAlias = Mapping[str, Any]

_LETTERS = ("A", "B", "C", "D")
_YES_NO = ("yes", "no")

# The subsets of MVBench in the order of the official evaluation.
MVBENCH_SUBSETS = (
    "episodic_reasoning",
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "counterfactual_inference",
)


@dataclass(frozen=True)
class _Question:
    """A row: its video's folder of frames, the text, name and text of every choice, the answer."""

    folder: str
    text: str
    choices: Sequence[tuple[str, str]]
    answer: str


def read_videomme(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """Video-MME: choices are "A. …" to "D. …", the answer is a letter."""

    def question(row: _Row, prompt: str) -> _Question:
        choices, answer = texts_of(row, "options"), text_of(row, "answer")
        if answer not in _LETTERS[: len(choices)]:
            raise DataError(f"the answer {answer!r} is none of the {len(choices)} options")
        lines = "\n".join((text_of(row, "question"), *choices))
        return _Question(
            name_of(row, "videoID"),
            f"{prompt} {lines}",
            [(choice, _without_letter(choice)) for choice in choices],
            choices[_LETTERS.index(answer)],
        )

    columns = ("videoID", "question", "options", "answer")
    return _read(task, options, root, _one_table(task, root, options), columns, question)


def read_nextqa(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """NExT-QA: five choices in columns of their own, the answer is a position."""
    columns = ("a0", "a1", "a2", "a3", "a4")

    def question(row: _Row, prompt: str) -> _Question:
        choices = [text_of(row, column) for column in columns]
        text, _ = _with_options(f"{prompt} {text_of(row, 'question')}", choices)
        answer = choices[_position(row, "answer", len(choices))]
        pairs = [(choice, choice) for choice in choices]
        return _Question(name_of(row, "video"), text, pairs, answer)

    wanted = ("video", "question", "answer", *columns)
    return _read(task, options, root, _one_table(task, root, options), wanted, question)


def read_egoschema(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """EgoSchema: choices are "A. …", the answer is a position; no space after the question."""

    def question(row: _Row, prompt: str) -> _Question:
        choices = texts_of(row, "option")
        return _Question(
            name_of(row, "video_idx"),
            f"{prompt} {text_of(row, 'question')}{' '.join(choices)}",
            [(choice, _without_letter(choice)) for choice in choices],
            choices[_position(row, "answer", len(choices))],
        )

    columns = ("video_idx", "question", "option", "answer")
    return _read(task, options, root, _one_table(task, root, options), columns, question)


def read_mvbench(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """MVBench: twenty subsets, choices become "(A) …", the answer is one of them as a text."""
    source = task.tables(options.labels)
    tables = [
        (subset, open_table(locate(part, root, download=options.download)))
        for subset in MVBENCH_SUBSETS
        for part in (dataclasses.replace(source, config=subset),)
    ]

    def question(row: _Row, prompt: str) -> _Question:
        choices, answer = texts_of(row, "candidates"), text_of(row, "answer")
        text, lettered = _with_options(f"{prompt} {text_of(row, 'question')}", choices)
        if answer not in choices:
            raise DataError(f"the answer {answer!r} is none of the candidates")
        last = max(place for place, choice in enumerate(choices) if choice == answer)
        pairs = [(choice, choice) for choice in lettered]
        return _Question(name_of(row, "video"), text, pairs, lettered[last])

    columns = ("video", "question", "candidates", "answer")
    return _read(task, options, root, tables, columns, question)


def read_activitynetqa(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """ActivityNet-QA: the questions whose answer is yes or no."""

    def question(row: _Row, prompt: str) -> _Question:
        answer = text_of(row, "answer")
        if answer not in _YES_NO:
            raise DataError(f"the answer {answer!r} is neither 'yes' nor 'no'")
        text = f"{prompt} {text_of(row, 'question')}? (A) yes; (B) no."
        choices = [(choice, choice) for choice in _YES_NO]
        return _Question(f"v_{name_of(row, 'video_name')}", text, choices, answer)

    columns = ("video_name", "question", "answer")
    return _read(task, options, root, _one_table(task, root, options), columns, question)


def _one_table(task: Task, root: Path, options: ReadOptions) -> list[tuple[str, Table]]:
    files = locate(task.tables(options.labels), root, download=options.download)
    return [("", open_table(files))]


def _read(
    task: Task,
    options: ReadOptions,
    root: Path,
    tables: Sequence[tuple[str, Table]],
    columns: Sequence[str],
    question: Callable[[_Row, str], _Question],
) -> TaskData:
    folder = media_folder(task, root)
    videos = FrameFolders(options.frames)
    mentions = Mentions()
    queries: list[Query] = []
    prompt = task.wording(options.instructions).query
    for number, (subset, asked) in enumerate(_questions(tables, columns, question, prompt)):
        for name, text in asked.choices:
            mentions.add_text(name, text)
        if options.limit is None or number < options.limit:
            names = mentions.names([name for name, _ in asked.choices])
            video = videos.video(folder / subset / asked.folder)
            item = Item(asked.text, video=video, id=str(number))
            queries.append(Query(item, (asked.answer,), candidates=names, labels=(asked.answer,)))
    files = [path for _, table in tables for path in table.files]
    return TaskData(task, queries, mentions.candidates(), files)


def _questions(
    tables: Sequence[tuple[str, Table]],
    columns: Sequence[str],
    question: Callable[[_Row, str], _Question],
    prompt: str,
) -> Iterator[tuple[str, _Question]]:
    for subset, table in tables:
        for index, row in enumerate(table.rows(*columns)):
            with row_named(table, index):
                asked = question(row, prompt)
            yield subset, asked


def _with_options(question: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """The question followed by lettered choices, one per line, and the lettered choices."""
    lettered = [f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(choices)]
    return "\n".join((question, "Options:", *lettered)).rstrip(), lettered


def _without_letter(choice: str) -> str:
    # "A. Apples." is embedded as "Apples"; without a letter the last character is left, as in the
    # official evaluation, where -1 is a position.
    return choice[choice.find(". ") :].strip(". ")


def _position(row: _Row, column: str, count: int) -> int:
    try:
        place = int(row[column])
        if isinstance(row[column], float) and place != row[column]:
            place = -1
    except (OverflowError, TypeError, ValueError):
        place = -1
    if not 0 <= place < count:
        raise DataError(f"the answer {row[column]!r} is not a position among {count} options")
    return place
