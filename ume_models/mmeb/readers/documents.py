"""Visual documents in the layout of BEIR: queries, a corpus of pages, and graded judgements.

Configurations "queries" (query-id, query), "corpus" (corpus-id, image) and "qrels" (query-id,
corpus-id, score). Pages are files where they have been extracted, else cells of the corpus; the
other way round where two versions of a corpus have been published: both extract to one folder, and
what lies there may be of the other one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ume_models.errors import DataError
from ume_models.mmeb.dataset import Candidates, Query, ReadOptions, TaskData
from ume_models.mmeb.locate import locate
from ume_models.mmeb.readers.cells import name_of, row_named, text_of
from ume_models.mmeb.readers.wording import instruct
from ume_models.mmeb.table import Table
from ume_models.mmeb.tables import open_table, picture
from ume_models.mmeb.tasks import Task
from ume_models.processing.items import Item, MediaSource

_JPEG = (".jpg", ".jpeg")
# Characters of a page's name that its file's name keeps; names may be longer than files' can be.
_KEPT = 50
# The exponential gain is 2^grade - 1, so larger ones are surely none and would drown all others.
_LARGEST_GRADE = 100


def read_vidore(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """ViDoRe and what follows its layout: pages are files "<corpus-id>.png"."""
    return _read(task, root, options, lambda name: f"{name}.png")


def read_visrag(task: Task, root: Path, options: ReadOptions) -> TaskData:
    """VisRAG: pages are named like files; extracted files have shortened names."""
    return _read(task, root, options, shortened_name)


def shortened_name(name: str) -> str:
    """The name of the file that a page of VisRAG is extracted to."""
    base, suffix = os.path.splitext(name)
    return f"{base[:_KEPT]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{suffix}"


class Pages(Candidates):
    """The pages of a collection, read one by one.

    Args:
        names: names in the order of the evaluation.
        rows: row of the corpus of each name that is there.
        clashes: names that several rows have.
        corpus: the table.
        folders: where pages may have been extracted to.
        extracted_first: take an extracted page before the corpus's own.
        file_name: name of a page's file.
        text: what is embedded with every page.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Mapping[str, int],
        clashes: Sequence[str],
        corpus: Table,
        folders: Sequence[Path],
        extracted_first: bool,
        file_name: Callable[[str], str],
        text: str,
    ) -> None:
        self.names, self.clashes = names, clashes
        self._rows, self._corpus, self._folders = rows, corpus, folders
        self._extracted_first, self._file_name, self._text = extracted_first, file_name, text

    def reading_order(self) -> Sequence[int]:
        # The judged pages stand first among the names, wherever they lie in the corpus.
        return sorted(range(len(self)), key=lambda at: self._rows.get(self.names[at], -1))

    def item(self, position: int) -> Item:
        name = self.names[position]
        return Item(self._text, (self._page(name),), id=name)

    def _page(self, name: str) -> MediaSource:
        ways = (self.extracted, self._in_corpus)
        for way in ways if self._extracted_first else reversed(ways):
            if (page := way(name)) is not None:
                return page
        return self._folders[0] / self._file_name(name)

    def _in_corpus(self, name: str) -> MediaSource | None:
        """A page's cell; None where the corpus has none, or the path of no file."""
        row = self._rows.get(name)
        if row is None or "image" not in self._corpus.columns:
            return None
        page = picture(self._corpus.cell(row, "image"), self._corpus.files[0].parent)
        if isinstance(page, bytes):
            return _as_extracted(page, self._file_name(name))
        return page if isinstance(page, Path) and os.path.isfile(page) else None

    def extracted(self, name: str) -> Path | None:
        """A page's file; None where it has not been extracted."""
        places = (folder / self._file_name(name) for folder in self._folders)
        # Names too long for the disk are no files; Path.is_file would raise.
        return next((place for place in places if os.path.isfile(place)), None)


def _read(
    task: Task, root: Path, options: ReadOptions, file_name: Callable[[str], str]
) -> TaskData:
    source = task.tables(options.labels)
    queries, qrels, corpus = (
        open_table(
            locate(dataclasses.replace(source, config=config), root, download=options.download)
        )
        for config in ("queries", "qrels", "corpus")
    )
    words = task.wording(options.instructions)
    judged = _judgements(qrels)
    rows: dict[str, int] = {}
    clashes: dict[str, None] = {}
    for number, row in enumerate(corpus.rows("corpus-id")):
        with row_named(corpus, number):
            name = name_of(row, "corpus-id")
        if rows.setdefault(name, number) != number:
            clashes[name] = None

    asked: list[Query] = []
    names: dict[str, None] = {}
    ids: dict[str, int] = {}
    unanswered: list[str] = []
    for number, row in enumerate(queries.rows("query-id", "query")):
        with row_named(queries, number):
            of_query, text = name_of(row, "query-id"), text_of(row, "query")
        answers = judged.get(of_query, {})
        if not answers:
            unanswered.append(of_query)
        names |= dict.fromkeys(answers)
        if options.limit is None or number < options.limit:
            ids[of_query] = ids.get(of_query, 0) + 1
            repeated = f"#{ids[of_query]}" if ids[of_query] > 1 else ""
            item = Item(instruct(words.query, text), id=of_query + repeated)
            grades = tuple(float(grade) for _, grade in answers.values())
            labels = tuple(label for label, _ in answers.values())
            asked.append(Query(item, tuple(answers), grades, labels=labels))
    if unanswered:
        raise DataError(
            f"{qrels.files[0]} has no answer for {_some(unanswered)} of {queries.files[0]}; get "
            "both tables again"
        )

    pages = Pages(
        list(names | dict.fromkeys(rows)),
        rows,
        list(clashes),
        corpus,
        [root / folder for folder in task.media],
        task.legacy_source is None,
        file_name,
        instruct(words.target),
    )
    lost = [name for name in names if name not in rows and pages.extracted(name) is None]
    if lost:
        raise DataError(
            f"{qrels.files[0]} names {_some(lost)}, which {corpus.files[0]} does not have; get "
            "both tables again"
        )
    files = [*queries.files, *qrels.files, *corpus.files]
    return TaskData(task, asked, pages, files)


def _judgements(qrels: Table) -> dict[str, dict[str, tuple[str | int, float]]]:
    """By query and page the page's id as the table has it and its grade, without grades of zero."""
    found: dict[str, dict[str, tuple[str | int, float]]] = {}
    for number, row in enumerate(qrels.rows("query-id", "corpus-id", "score")):
        with row_named(qrels, number):
            query, name = name_of(row, "query-id"), name_of(row, "corpus-id")
            score = row["score"]
            # Compared in this way, NaN is refused as well.
            number_like = isinstance(score, (int, float)) and not isinstance(score, bool)
            if not number_like or not 0 <= score <= _LARGEST_GRADE:
                raise DataError(f"the score {score!r} is not a number from 0 to {_LARGEST_GRADE}")
        if score > 0:
            pages = found.setdefault(query, {})
            before = pages.get(name, (row["corpus-id"], 0))[1]
            pages[name] = (row["corpus-id"], max(before, score))
    return found


def _as_extracted(page: bytes, file_name: str) -> bytes:
    """A page as the official evaluation has it after it wrote the page to that file.

    That is the same picture for ".png". For ".jpg" it is compressed anew with Pillow's standard
    quality, even where the table has a JPEG.
    """
    if os.path.splitext(file_name)[1].lower() not in _JPEG:
        return page
    written = io.BytesIO()
    try:
        with Image.open(io.BytesIO(page)) as opened:
            opened.save(written, format="JPEG")
    except Exception:  # unreadable, for whatever a decoder says; transparency, which JPEG lacks
        return page
    return written.getvalue()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names)} names ({shown}{', …' if len(names) > 3 else ''})"
