"""Progress of an evaluation on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ume_models.commands.console import messages
from ume_models.commands.progress import duration
from ume_models.mmeb import progress
from ume_models.mmeb.keys import KINDS, Kind
from ume_models.mmeb.progress import Remaining
from ume_models.mmeb.results import TaskScore

_SECONDS_BETWEEN_LINES = 10.0
_NAMES = {"text": "texts", "image": "images and pages", "video": "videos"}


class EvalProgress(progress.Progress):
    """Shows items by input class, the time left, and every score as it comes.

    Args:
        quiet: show nothing, as processes that do not lead a team.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._totals: dict[Kind, int] = {}
        self._done: dict[Kind, int] = {}
        self._told_at = time.monotonic()  # the first line after a while, too
        self._bars: dict[Kind, TaskID] = {}
        self._bar: TaskID | None = None  # of what comes before
        self._display: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._display = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=messages(),
            )

    def __enter__(self) -> EvalProgress:
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._display is not None:
            self._display.stop()

    def reading(self, task: str, number: int, of: int) -> None:
        self._step("reading", f"reading {task}", number, of)

    def planned(self, totals: Mapping[Kind, int], done: Mapping[Kind, int]) -> None:
        self._totals, self._done = dict(totals), dict(done)
        self._end_step()
        before = sum(done.values())
        if before:
            then = "going on from there" if before < sum(totals.values()) else "nothing to embed"
            self._print(f"{before} of {sum(totals.values())} items are done, {then}")
        if self._display is not None:
            for kind in KINDS:
                if totals[kind]:
                    self._bars[kind] = self._display.add_task(
                        _NAMES[kind], total=totals[kind], completed=done[kind], left=""
                    )

    def embedding(self, kind: Kind, done: int, items: int) -> None:
        if self._display is not None and kind in self._bars:
            self._display.update(self._bars[kind], completed=self._done[kind] + done)

    def embedded(self, done: Mapping[Kind, int], remaining: Remaining) -> None:
        self._done = dict(done)
        left = _left(remaining)
        if self._display is not None:
            for kind, bar in self._bars.items():
                self._display.update(bar, completed=done[kind], left="")
            if self._bars:
                self._display.update(next(reversed(self._bars.values())), left=left)
            return
        if self._is_time():
            counts = ", ".join(
                f"{done[kind]} of {self._totals[kind]} {_NAMES[kind]}"
                for kind in KINDS
                if self._totals.get(kind)
            )
            self._print(f"{counts}; {left}")

    def scored(self, score: TaskScore) -> None:
        self._print(f"{score.task}: {score.metric} {100 * score.score:.1f}")

    def note(self, text: str) -> None:
        self._print(text)

    def checking(self, done: int, total: int) -> None:
        """How much of a check is done."""
        self._step("checking", f"checked {done} of {total}", done, total)

    def _step(self, what: str, line: str, done: int, of: int) -> None:
        """One bar for what comes before embedding; the line now and then where there are none."""
        if self._display is not None:
            if self._bar is None:
                self._bar = self._display.add_task(what, total=of, left="")
            self._display.update(self._bar, completed=done, total=of)
        elif self._is_time():
            self._print(line)

    def _end_step(self) -> None:
        if self._display is not None and self._bar is not None:
            self._display.remove_task(self._bar)
            self._bar = None

    def _is_time(self) -> bool:
        """Whether the last line was told some time ago; then this is the next one's."""
        now = time.monotonic()
        if now - self._told_at < _SECONDS_BETWEEN_LINES:
            return False
        self._told_at = now
        return True

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        console = messages() if self._display is None else self._display.console
        console.print(text, markup=False)


def _left(remaining: Remaining) -> str:
    """The time left, and what is not known of it."""
    if remaining.seconds is None:
        return "time left not known yet"
    text = f"about {duration(remaining.seconds)} left"
    if remaining.unmeasured:
        names = " and ".join(_NAMES[kind] for kind in remaining.unmeasured)
        text += f", without {names}, none of which was embedded yet"
    return text
