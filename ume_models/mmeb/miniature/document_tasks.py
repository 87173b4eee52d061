"""The 24 tasks with pages of documents: queries, a collection of pages, and who answers whom."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from random import Random
from typing import Any

from ume_models.mmeb.miniature.folder import DataFolder
from ume_models.mmeb.miniature.material import Thing, pools, shown_of
from ume_models.mmeb.mmeb_v2 import MMEB_V2
from ume_models.mmeb.tasks import Task

_QUERIES = 8
_PAGES = 14
_CHARTS = ("arxivqa", "infovqa", "ChartQA", "PlotQA", "SlideVQA", "economics", "energy", "tatdqa")
_PLAIN_WORDS = frozenset(
    (
        "a", "an", "the", "of", "by", "in", "is", "which", "about", "from", "highest",
        "chart", "bar", "line", "month", "day", "city",
    )
)  # fmt: skip
_LANGUAGES = ("english", "french", "german", "spanish")


def write_document_tasks(folder: DataFolder) -> None:
    """Tables and pages of the document tasks of MMEB-v2, with both versions of the labels."""
    for number, task in enumerate(task for task in MMEB_V2 if task.modality == "visdoc"):
        _Documents(folder, task, number).write()


class _Documents:
    """One task.

    Args:
        folder: where to write.
        task: its row of the table.
        number: its position; what differs among published tasks alternates with it.
    """

    def __init__(self, folder: DataFolder, task: Task, number: int) -> None:
        self.folder, self.task, self.number = folder, task, number
        # Tasks with other labels or units have the same content.
        rng = folder.rng(task.name.replace("-doc", "-page"))
        pool = "chart_t2p" if any(word in task.name for word in _CHARTS) else "page_t2p"
        self.asked, self.pages = pools()[pool].draw(rng, _QUERIES, _PAGES, shown_of)
        self.graded = task.group == "ViDoRe-v2"
        self.rng: Random = rng

    def write(self) -> None:
        ids = {page.id: self._page_id(position) for position, page in enumerate(self.pages)}
        self._write_pages(ids)
        relevant = [self._relevant(thing, ids) for thing in self.asked]
        self._write_tables(self.task.source.paths[0], ids, relevant)
        if self.task.legacy_source is not None:
            # The labels published first: some pages are off by one place.
            place = {id: position for position, id in enumerate(ids.values())}
            names = list(ids.values())
            wrong = [
                [(names[(place[page] + 1) % len(names)], score) for page, score in answers]
                if position % 3 == 0
                else answers
                for position, answers in enumerate(relevant)
            ]
            self._write_tables(self.task.legacy_source.paths[0], ids, wrong)

    def _page_id(self, position: int) -> str | int:
        """Ids as the sources have them: numbers, names of pages, names of files."""
        if self.task.reader == "visrag":
            stem = "a_very_long_name_of_a_page_" * 4 if position == 2 else "page_"
            return f"{stem}{position:03d}.png"
        if self.task.group == "VisDoc-OOD":
            return f"report-{position // 3}_{position % 3 + 1}"
        return position + (100 if self.graded else 0)

    def _relevant(self, thing: Thing, ids: dict[str, str | int]) -> list[tuple[str | int, int]]:
        """Pages that answer a query and their grades."""
        page = ids[thing.id]
        if self.task.name.endswith("-doc"):  # all pages of the document
            document = str(page).rsplit("_", 1)[0]
            return [(id, 1) for id in ids.values() if str(id).rsplit("_", 1)[0] == document]
        answers: list[tuple[str | int, int]] = [(page, 1)]
        if self.graded:
            answers = [(page, 2)]
            answers += [(ids[other.id], 1) for other in self.pages
                        if other != thing and _related(thing, other)]  # fmt: skip
            # As annotators see them: the order says nothing about the grade.
            self.rng.shuffle(answers)
        return answers

    def _write_pages(self, ids: dict[str, str | int]) -> None:
        """Pages as files: in every second task, and always where tables hold no pictures."""
        if self.folder.tables == "parquet" and self.number % 2 == 0:
            return
        # The published archives unpack to a folder of the same name once more.
        place = self.task.media[1 if self.number % 4 == 1 else 0]
        for page in self.pages:
            name = _file_name(self.task.reader, ids[page.id])
            self.folder.picture(f"{place}/{name}", page.shown[0])

    def _write_tables(
        self, place: str, ids: dict[str, str | int], relevant: list[list[tuple[str | int, int]]]
    ) -> None:
        split = self.task.source.split
        names: list[str | int] = list(range(len(self.asked)))
        if self.task.reader == "visrag" or self.task.group == "VisDoc-OOD":
            names = [f"query-{number}" for number in names]
        queries: list[dict[str, Any]] = [
            {"query-id": name, "query": thing.caption}
            for name, thing in zip(names, self.asked, strict=True)
        ]
        if self.graded:
            for number, row in enumerate(queries):
                row["language"] = _LANGUAGES[number % 4]
        corpus = []
        for page in self.pages:
            row = {"corpus-id": ids[page.id]}
            if self.folder.tables == "parquet":
                picture = page.shown[0]
                row["image"] = {"bytes": picture.read_bytes(), "path": picture.name}
            corpus.append(row)
        qrels = [
            {"query-id": name, "corpus-id": page, "score": score}
            for name, answers in zip(names, relevant, strict=True)
            for page, score in answers
        ]
        # A page that was judged and does not answer, and one judged twice.
        unused = [id for id in ids.values() if id not in dict(relevant[0])]
        qrels.append({"query-id": names[0], "corpus-id": unused[0], "score": 0})
        qrels.append(dict(qrels[0]))
        self.folder.table(place, "queries", split, queries)
        self.folder.table(place, "corpus", split, corpus, shards=1 + self.number % 2)
        self.folder.table(place, "qrels", split, qrels)


def _file_name(reader: str, page: str | int) -> str:
    """Names of extracted pages as the official evaluation makes them."""
    if reader != "visrag":
        return f"{page}.png"
    path = PurePosixPath(str(page))
    digest = hashlib.md5(str(page).encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{str(page)[: -len(path.suffix)][:50]}_{digest}{path.suffix}"


def _related(thing: Thing, other: Thing) -> bool:
    """Whether two captions share a word of their subject."""
    return bool(_words(thing) & _words(other))


def _words(thing: Thing) -> set[str]:
    words = thing.caption.lower().replace(",", " ").replace("?", " ").split()
    return {*words} - _PLAIN_WORDS
