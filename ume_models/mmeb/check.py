"""Looking for everything that would stop an evaluation or spoil its scores, before hours are spent.

Every task is read, every label looked up, every picture and frame opened; a sample is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ume_models.errors import DataError, ItemError
from ume_models.mmeb.dataset import Query, ReadOptions, TaskData
from ume_models.mmeb.frames import missing_frames
from ume_models.mmeb.picture_check import PictureCheck
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.tasks import Task
from ume_models.processing import prefetch
from ume_models.processing.items import Item
from ume_models.processing.prompt import clean_text

_NAMED = 3
_DECODED_PER_TASK = 64

Severity: TypeAlias = Literal["error", "warning"]
# What is wrong ({n} things of {of}), and what to do.
_KINDS: dict[str, tuple[Severity, str, str]] = {
    "repeated id": (
        "error", "{n} of {of} queries have an id that another one has",
        "download the tables again",
    ),
    "no answer": (
        "error", "{n} of {of} queries have no answer",
        "download the tables again",
    ),
    "no list": (
        "error", "{n} of {of} queries have no candidates to be ranked among",
        "download the tables again",
    ),
    "unknown label": (
        "error", "the answers of {n} of {of} queries are not among their candidates",
        "get the version of the tables that belongs to these labels, or try the other labels",
    ),
    "unpaired grades": (
        "error", "{n} of {of} queries have not as many grades as answers",
        "download the tables again",
    ),
    "clash": (
        "warning", "{n} of {of} candidates have several contents under one name; the first counts",
        "compare the tables with the published ones",
    ),
    "no frames": (
        "error", "the frames of {n} of {of} videos are missing",
        "unpack the archives of frames, or extract frames from each video into the folder: "
        "ffmpeg -i VIDEO -vf fps=1 FOLDER/%04d.jpeg",
    ),
    "missing": (
        "error", "{n} of {of} files are missing",
        "unpack the archives of the benchmark's media there",
    ),
    "damaged": (
        "error", "{n} of {of} pictures cannot be read",
        "unpack or download them again",
    ),
    "text": (
        "error", "{n} of {of} texts cannot be embedded",
        "remove the token from the tables",
    ),
    "unreadable": (
        "error", "{n} of {of} candidates cannot be read from their table",
        "download the tables again",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data of one task.

    Attributes:
        task: its name.
        severity: "error" if it stops the evaluation or makes scores wrong, else "warning".
        what: what is wrong, and how often.
        where: the first few names.
        remedy: what to do about it.
    """

    task: str
    severity: Severity
    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f": {self.where}" if self.where else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity}: {self.task}: {self.what}{where}{remedy}"


def check(
    tasks: Sequence[Task],
    root: Path,
    options: ReadOptions | None = None,
    *,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """What is wrong with a data root; an empty list if nothing was found.

    Of every picture the head and the end are looked at; about 64 items of each task, evenly spread,
    and all that look odd are decoded.

    Args:
        tasks: the tasks to check.
        root: the data root.
        options: how tasks are read.
        workers: threads that open files.
        progress: called with the number of items that are done and the number of all.

    Returns:
        Problems in the order of the tasks.
    """
    options = options or ReadOptions()
    found: dict[str, list[Problem]] = {}
    read: list[TaskData] = []
    for task in tasks:
        try:
            read.append(read_task(task, root, options))
        except DataError as error:
            what = str(error).removeprefix(f"{task.name}: ")
            found[task.name] = [Problem(task.name, "error", what)]
    total = sum(len(data.queries) + len(data.candidates) for data in read)
    pictures, done = PictureCheck(), 0
    for data in read:
        findings = _Findings(data)
        _check_labels(data, findings)
        for _ in _check_items(data, pictures, findings, workers):
            done += 1
            if progress is not None:
                progress(done, total)
        found[data.task.name] = findings.problems()
    return [problem for task in tasks for problem in found.get(task.name, [])]


class _Findings:
    """What was found in one task, by kind."""

    def __init__(self, data: TaskData) -> None:
        self._task = data.task.name
        self._names: dict[str, dict[str, str]] = {}
        self.whole: dict[str, int] = {}

    def add(self, kind: str, name: str, reason: str = "") -> None:
        """One thing of a kind; naming it again changes nothing."""
        self._names.setdefault(kind, {}).setdefault(name, reason)

    def problems(self) -> list[Problem]:
        """One problem per kind."""
        problems = []
        for kind, (severity, what, remedy) in _KINDS.items():
            names = self._names.get(kind, {})
            if names:
                whole = max(self.whole.get(kind, 0), len(names))
                text = what.format(n=len(names), of=whole)
                problems.append(Problem(self._task, severity, text, _first(names), remedy))
        if not self.whole.get("no answer"):
            remedy = _KINDS["no answer"][2]
            problems.append(Problem(self._task, "error", "there are no queries", remedy=remedy))
        return problems


def _first(names: dict[str, str]) -> str:
    """The first names, with reasons, and how many more there are."""
    shown = [f"{name} ({reason})" if reason else name for name, reason in names.items()][:_NAMED]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown) + more


def _check_labels(data: TaskData, findings: _Findings) -> None:
    """Ids, answers and lists of candidates."""
    for kind in ("repeated id", "no answer", "no list", "unknown label", "unpaired grades"):
        findings.whole[kind] = len(data.queries)
    findings.whole["clash"] = len(data.candidates)
    names = frozenset(data.candidates.names)
    local = data.task.ranking == "local"
    ids: set[str] = set()
    for query in data.queries:
        id = query.item.id
        if id in ids:
            findings.add("repeated id", id)
        ids.add(id)
        if not query.relevant:
            findings.add("no answer", id)
        if not (query.candidates if local else names):
            findings.add("no list", id)
        elif unknown := _unknown_label(query, names, local):
            findings.add("unknown label", id, unknown)
        if query.grades is not None and len(query.grades) != len(query.relevant):
            findings.add("unpaired grades", id)
    for name in data.candidates.clashes:
        findings.add("clash", name)


def _unknown_label(query: Query, names: frozenset[str], local: bool) -> str:
    """The first answer that the query cannot be ranked to find; "" if there is none."""
    ranked = names.intersection(query.candidates) if local else names
    return next((repr(label) for label in query.relevant if label not in ranked), "")


def _check_items(
    data: TaskData, pictures: PictureCheck, findings: _Findings, workers: int
) -> Iterator[None]:
    """Texts and media of all queries and candidates, one step for each."""
    queries, total = len(data.queries), len(data.queries) + len(data.candidates)
    step = max(1, total // _DECODED_PER_TASK)
    seen: dict[str, set[str]] = {"opened": set(), "video": set()}

    def look(position: int) -> list[tuple[str, str, str]]:
        if position < queries:
            return _look(data.queries[position].item, "query", pictures, position % step == 0)
        candidate = position - queries
        try:
            item = data.candidates.item(candidate)
        except DataError as error:
            return [("unreadable", data.candidates.names[candidate], str(error))]
        return _look(item, "candidate", pictures, position % step == 0)

    findings.whole |= {"text": total, "unreadable": len(data.candidates)}
    for wrong in prefetch(look, range(total), workers, 8 * max(1, workers)):
        for kind, name, reason in wrong:
            if kind in seen:
                seen[kind].add(name)
            else:
                findings.add(kind, name, reason)
        yield
    files = len(seen["opened"])
    findings.whole |= {"missing": files, "damaged": files, "no frames": len(seen["video"])}


def _look(
    item: Item, side: str, pictures: PictureCheck, decode: bool
) -> list[tuple[str, str, str]]:
    """What is wrong with an item: kind, name and reason.

    Files that were looked at are there as "opened", and a video by its first frame as "video".
    """
    wrong = []
    try:
        clean_text(f"{item.instruction}{item.text}")
    except ItemError as error:
        wrong.append(("text", f"{side} {item.id}", error.reason))
    if item.video:
        wrong.append(("video", str(item.video[0]), ""))
    folder = missing_frames(item)
    if folder is not None:
        return [*wrong, ("no frames", str(folder), "")]
    for number, source in enumerate((*item.images, *(item.video or ()))):
        name = str(source) if isinstance(source, (str, Path)) else f"{side} {item.id}, {number}"
        wrong.append(("opened", name, ""))
        if found := pictures.wrong(source, decode=decode):
            wrong.append((found[0], name, found[1]))
    return wrong
