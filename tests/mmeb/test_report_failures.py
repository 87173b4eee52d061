"""Galleries of failures: the worst queries, what was found, and the right answers as pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Candidates, ListedCandidates, Query, TaskData
from ume_models.mmeb.metrics import Ranking
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.report.failures import Failure, failure_section
from ume_models.mmeb.report.page import summary_page
from ume_models.mmeb.results import TaskScore, score_task
from ume_models.mmeb.summary import Summary
from ume_models.processing.items import Item
from ume_models.retrieval.gallery import Section

TASKS = {task.name: task for task in MMEB_V2}
HIT, GRADED = TASKS["MSCOCO_t2i"], TASKS["VisRAG_PlotQA"]
EMPTY = Summary({"benchmark": "MMEB-v2"}, [], [], {}, {}, None)


def ranked(id: str, names: str, scores: Sequence[float], *relevant: str) -> Ranking:
    return Ranking(id, tuple(names), tuple(scores), relevant)


def data_of(queries: Sequence[Item], candidates: Candidates) -> TaskData:
    return TaskData(HIT, [Query(item, ("a",)) for item in queries], candidates)


def texts(names: str) -> ListedCandidates:
    return ListedCandidates([(name, Item(f"text {name}", id=name)) for name in names])


def section(data: TaskData, rankings: Sequence[Ranking], **options: int) -> Section:
    return failure_section(data, score_task(data.task, rankings, 9), rankings, **options)


def cases(section: Section) -> list[Failure]:
    assert all(isinstance(block, Failure) for block in section.blocks)
    return [block for block in section.blocks if isinstance(block, Failure)]


RANKINGS = [
    ranked("near", "bac", (0.50, 0.49, 0.1), "a"),
    ranked("right", "abc", (0.90, 0.20, 0.1), "a"),
    ranked("far", "bcdea", (0.90, 0.80, 0.7, 0.6, 0.3), "a"),
    ranked("lost", "bcde", (0.90, 0.80, 0.7, 0.6), "a", "f"),
]
DATA = data_of(
    [Item(f"query {ranking.id}", id=ranking.id) for ranking in RANKINGS], texts("abcdef")
)


def test_the_worst_come_first() -> None:
    made = section(DATA, RANKINGS, shown=2)
    assert [block.query.id for block in made.blocks] == ["far", "lost", "near"]  # 0.6, ≥ 0.3, 0.01
    assert made.title == "MSCOCO_t2i"
    assert made.facts == [("hit@1", "25.0"), ("best result wrong", "3 of 4 queries")]
    assert [block.query.id for block in section(DATA, RANKINGS, cases=1).blocks] == ["far"]
    assert section(DATA, RANKINGS[1:2]).blocks == []


def test_right_answers_stand_beside_what_was_found() -> None:
    far, lost, near = cases(section(DATA, RANKINGS, shown=2))
    assert [found.card.text for found in far.found] == ["text b", "text c"]
    assert [found.relevant for found in near.found] == [False, True]
    assert near.answers == []  # among the results shown
    (answer,) = far.answers
    assert (answer.card.text, answer.place, answer.score) == ("text a", "rank 5", 0.3)
    assert [answer.place for answer in lost.answers] == ["not among the first 4"] * 2
    assert far.note == "The first right answer has rank 5, 0.600 below the best result."
    assert lost.note == "No right answer among the first 4."
    assert far.answered is False


def test_many_right_answers_are_cut() -> None:
    names = "abcdefgh"
    ranking = Ranking("q", ("x", *names[:2]), (0.9, 0.5, 0.4), tuple(names), (1.0,) * 8)
    data = TaskData(GRADED, [Query(Item("?", id="q"), tuple(names))], texts("x" + names))
    (block,) = cases(section(data, [ranking], shown=1))
    assert [answer.place for answer in block.answers] == [
        "rank 2", "rank 3", "not among the first 3"
    ]  # fmt: skip
    assert block.more == 5


def test_a_right_first_result_can_still_be_a_failure() -> None:
    ranking = Ranking("q", ("a", "x", "b"), (0.9, 0.8, 0.7), ("a", "b"), (1.0, 1.0))
    data = TaskData(GRADED, [Query(Item("?", id="q"), ("a", "b"))], texts("abx"))
    made = section(data, [ranking])
    (block,) = cases(made)
    assert block.answered is True
    assert block.note == "The best result is right; 2 right answers in all."
    assert made.facts[1] == ("best result wrong", "0 of 1 query")


def test_the_instruction_does_not_push_the_question_out() -> None:
    task = TASKS["MVBench"]
    asked = Item(f"{task.instructions.query} What happens?\n(A) yes", id="far")
    data = TaskData(task, [Query(asked, ("a",))], texts("abcdef"))
    (block,) = cases(section(data, [RANKINGS[2]]))
    assert block.query.text == "What happens?\n(A) yes"
    # Of a text that is nothing else it stays, of candidates as of queries.
    task = TASKS["VATEX"]
    alone = task.instructions.target
    assert alone and task.instructions.query
    candidates = ListedCandidates(
        [("b", Item(alone, id="b")), ("a", Item(f"{alone} More.", id="a"))]
    )
    query = Item(task.instructions.query, id="far")
    (block,) = cases(section(TaskData(task, [Query(query, ("a",))], candidates), [RANKINGS[2]]))
    assert block.query.text == task.instructions.query
    assert block.found[0].card.text == alone
    assert block.answers == [] and block.found[4].card.text == "More."


def test_names_that_are_the_text_are_shown_once() -> None:
    listed = [("b", Item("b", id="b")), ("a\n", Item("a", id="a\n")), ("c", Item("see", id="c"))]
    ranking = Ranking("far", ("b", "c"), (0.9, 0.8), ("a\n",))
    made = section(data_of([Item("?", id="far")], ListedCandidates(listed)), [ranking])
    assert re.findall(r'<p class="id">(\w+)', summary_page(EMPTY, [made])) == ["c"]


def test_long_names_of_tasks_can_be_broken() -> None:
    page = summary_page(EMPTY, [Section("ViDoRe_esg_reports", [])])
    assert "<summary><b>ViDoRe_<wbr>esg_<wbr>reports</b>" in page
    assert re.search(r"summary b \{[^}]*overflow-wrap: anywhere", page)


def test_unknown_names_and_scores_are_told() -> None:
    ranking = Ranking("0", ("b", "zz"), (), ("yy",))
    made = section(data_of([], texts("ab")), [ranking])
    (block,) = cases(made)
    assert "not among the data" in block.query.text
    assert "not among the candidates" in block.found[1].card.text
    assert "not among the candidates" in block.answers[0].card.text
    page = summary_page(EMPTY, [made])
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


class Torn(ListedCandidates):
    """The contents of one candidate cannot be read; counts which ones are."""

    def __init__(self, names: str) -> None:
        super().__init__([(name, Item(f"text {name}", id=name)) for name in names])
        self.read: list[int] = []

    def item(self, position: int) -> Item:
        self.read.append(position)
        if self.names[position] == "b":
            raise DataError("row 1 of the table is torn")
        return super().item(position)


def test_only_what_is_shown_is_read_and_what_is_torn_is_told() -> None:
    candidates = Torn("abcdefghij")
    (block,) = cases(section(data_of([], candidates), [RANKINGS[2]], shown=1))
    assert candidates.read == [0, 1]  # the right answer and the first result, in order
    assert "row 1 of the table is torn" in block.found[0].card.text


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (600, 300), "red").save(path)
    return path


def test_pictures_are_inside_of_the_page_and_stored_once(picture: Path) -> None:
    green = io.BytesIO()
    Image.new("RGB", (900, 900), "green").save(green, "png")
    frames = tuple(Image.new("RGB", (40, 40), (0, 0, 10 * n)) for n in range(8))
    candidates = ListedCandidates(
        [
            ("a", Item(images=(green.getvalue(),), id="a")),
            ("b", Item(images=(picture,), id="b")),
            ("c", Item(video=frames, id="c")),
            ("d", Item("<b>bold</b>", images=(b"no picture",), id="d")),
        ]
    )
    query = Item("<|image_pad|>\nFind it", images=(picture,), id="far")
    made = section(data_of([query], candidates), [RANKINGS[2]], shown=3)
    (block,) = cases(made)
    assert block.query.text == "Find it"
    (kept,) = block.answers[0].card.images
    assert isinstance(kept, Image.Image) and kept.size == (256, 256)
    assert len(block.found[1].card.video) == 4  # every other frame

    page = summary_page(EMPTY, [made], max_side=100)
    pictures = re.findall(
        r'<image id="(\w+)" width="(\d+)" height="(\d+)" href="(data:[^"]+)"', page
    )
    assert len(pictures) == 6  # red once, green, four frames
    sizes = {(int(width), int(height)) for _, width, height, _ in pictures}
    assert sizes == {(100, 50), (100, 100), (40, 40)}
    used = re.findall(r'<use href="#(\w+)"', page)
    assert len(used) == 7 and set(used) == {key for key, *_ in pictures}
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0][3].partition(",")[2])))
    assert first.convert("RGB").getpixel((5, 5))[0] > 200
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page
    assert "Right answer" in page and "rank 5" in page


def test_task_scores_of_official_pairing_are_followed() -> None:
    grades = (3.0, 1.0)
    ranking = Ranking("q", ("2", "1"), (0.9, 0.8), ("2", "1"), grades, (2, 1))
    data = TaskData(GRADED, [Query(Item("?", id="q"), ("2", "1"))], texts("12"))
    fair: TaskScore = score_task(GRADED, [ranking], 2)
    official = score_task(GRADED, [ranking], 2, legacy=True)  # the set of 2 and 1 begins with 1
    assert failure_section(data, fair, [ranking]).blocks == []
    assert len(failure_section(data, official, [ranking]).blocks) == 1
