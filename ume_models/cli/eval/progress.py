"""Progress of an evaluation on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn

from ume_models.cli.progress import Display, duration
from ume_models.cli.terminal import tell
from ume_models.mmeb import progress
from ume_models.mmeb.keys import KINDS, Kind
from ume_models.mmeb.progress import Remaining
from ume_models.mmeb.results import TaskScore

_NAMES = {"text": "texts", "image": "images and pages", "video": "videos"}


class EvalProgress(Display, progress.Progress):
    """Shows items by input class, the time left, and every score as it comes."""

    def __init__(self) -> None:
        super().__init__(
            10.0,
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._totals: dict[Kind, int] = {}
        self._done: dict[Kind, int] = {}
        self._bars: dict[Kind, TaskID] = {}
        self._step_bar: TaskID | None = None  # of what comes before embedding

    def reading(self, task: str, number: int, of: int) -> None:
        self._step("reading", f"reading {task}", number, of)

    def planned(self, totals: Mapping[Kind, int], done: Mapping[Kind, int]) -> None:
        self._totals, self._done = dict(totals), dict(done)
        before = sum(done.values())
        if before:
            then = "going on from there" if before < sum(totals.values()) else "nothing to embed"
            tell(f"{before} of {sum(totals.values())} items are done, {then}")
        if self.bars is not None:
            if self._step_bar is not None:
                self.bars.remove_task(self._step_bar)
                self._step_bar = None
            for kind in KINDS:
                if totals[kind]:
                    self._bars[kind] = self.bars.add_task(
                        _NAMES[kind], total=totals[kind], completed=done[kind], left=""
                    )

    def embedding(self, kind: Kind, done: int, items: int) -> None:
        if self.bars is not None and kind in self._bars:
            self.bars.update(self._bars[kind], completed=self._done[kind] + done)

    def embedded(self, done: Mapping[Kind, int], remaining: Remaining) -> None:
        self._done = dict(done)
        left = _left(remaining)
        if self.bars is not None:
            for kind, bar in self._bars.items():
                last = kind == next(reversed(self._bars))
                self.bars.update(bar, completed=done[kind], left=left if last else "")
        elif self.is_time():
            counts = ", ".join(
                f"{done[kind]} of {self._totals[kind]} {_NAMES[kind]}"
                for kind in KINDS
                if self._totals.get(kind)
            )
            tell(f"{counts}; {left}")

    def scored(self, score: TaskScore) -> None:
        tell(f"{score.task}: {score.metric} {100 * score.score:.1f}")

    def note(self, text: str) -> None:
        tell(text)

    def checking(self, done: int, total: int) -> None:
        """How much of a check is done."""
        self._step("checking", f"checked {done} of {total}", done, total)

    def _step(self, what: str, line: str, done: int, of: int) -> None:
        """One bar for what comes before embedding; the line now and then where there are none."""
        if self.bars is not None:
            if self._step_bar is None:
                self._step_bar = self.bars.add_task(what, total=of, left="")
            self.bars.update(self._step_bar, completed=done, total=of)
        elif self.is_time():
            tell(line)


def _left(remaining: Remaining) -> str:
    """The time left, and what is not known of it."""
    if remaining.seconds is None:
        return "time left not known yet"
    text = f"about {duration(remaining.seconds)} left"
    if remaining.unmeasured:
        names = " and ".join(_NAMES[kind] for kind in remaining.unmeasured)
        text += f", without {names}, none of which was embedded yet"
    return text
