"""Looking for everything that would stop an evaluation or spoil its scores, before hours are spent.

Every task is read, every label looked up, every picture and frame opened; a sample is decoded.
Lengths are not checked: whether a prompt fits the model is known only with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from ume_models.embedders.plume_prompt import clean_text
from ume_models.errors import DataError, ItemError
from ume_models.mmeb.answers import KINDS, NO_QUERIES, first_of, wrong_answers
from ume_models.mmeb.dataset import ReadOptions, TaskData
from ume_models.mmeb.frames import missing_frames
from ume_models.mmeb.picture_check import PictureCheck
from ume_models.mmeb.readers import read_task
from ume_models.mmeb.readers.cells import UNEXPECTED
from ume_models.mmeb.tasks import Task
from ume_models.processing import prefetch
from ume_models.processing.items import Item

_DECODED_PER_TASK = 64

Severity: TypeAlias = Literal["error", "warning"]
# What is wrong ({n} things of {of}), and what to do.
_KINDS: dict[str, tuple[Severity, str, str]] = {
    kind: ("error", what, remedy) for kind, (what, remedy) in KINDS.items()
} | {
    "clash": (
        "warning", "{n} of {of} candidates have several contents under one name; the first counts",
        "compare the tables with the published ones",
    ),
    "repeated": (
        "warning", "{n} of {of} queries repeat another one with the same clips",
        "these may be the labels before VLM2Vec removed repetitions; get VLM2Vec/MomentSeeker",
    ),
    "mixed frames": (
        "error", "the frames of {n} of {of} videos are of different sizes",
        "extract the frames of these videos again, or resize them to one size",
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
        "remove what is named from the tables",
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
            found[task.name] = [Problem(task.name, "error", error.message)]
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
                problems.append(Problem(self._task, severity, text, first_of(names), remedy))
        if not self.whole.get("no answer"):
            what, remedy = NO_QUERIES
            problems.append(Problem(self._task, "error", what, remedy=remedy))
        return problems


def _check_labels(data: TaskData, findings: _Findings) -> None:
    """Ids, answers and lists of candidates."""
    findings.whole |= dict.fromkeys(KINDS, len(data.queries))
    findings.whole["clash"] = len(data.candidates)
    for kind, ids in wrong_answers(data).items():
        for id, reason in ids.items():
            findings.add(kind, id, reason)
    for name in data.candidates.clashes:
        findings.add("clash", name)
    if data.task.reader == "momentseeker":  # published with repetitions at first
        findings.whole["repeated"] = len(data.queries)
        seen = set()
        for query in data.queries:
            content = (replace(query.item, id=""), query.relevant, frozenset(query.candidates))
            if content in seen:
                findings.add("repeated", str(query.item.id))
            seen.add(content)


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
        except (DataError, *UNEXPECTED) as error:
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
    videos = len(seen["video"])
    findings.whole |= {"missing": files, "damaged": files}
    findings.whole |= {"no frames": videos, "mixed frames": videos}


def _look(
    item: Item, side: str, pictures: PictureCheck, decode: bool
) -> list[tuple[str, str, str]]:
    """What is wrong with an item: kind, name and reason.

    Files that were looked at are there as "opened", and a video by its first frame as "video".
    """
    wrong = []
    try:
        clean_text(f"{item.instruction}{item.text}").encode()
        str(item.id).encode()
    except ItemError as error:
        wrong.append(("text", f"{side} {item.id}", error.reason))
    except UnicodeEncodeError as error:
        name = f"{side} {item.id}".encode(errors="backslashreplace").decode()
        half = ascii(error.object[error.start])
        wrong.append(("text", name, f"it holds half a character, {half}"))
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
    frames = [frame for frame in item.video or () if isinstance(frame, (str, Path))]
    sizes = sorted({size for frame in frames if (size := pictures.frame_size(frame))})
    if len(sizes) > 1:
        some = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        wrong.append(("mixed frames", str(Path(frames[0]).parent), f"resized to {some}"))
    return wrong
