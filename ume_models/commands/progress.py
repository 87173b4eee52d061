"""Progress on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ume_models.commands.console import messages

_SECONDS_BETWEEN_LINES = 2.0


class ItemProgress:
    """Counts items. The remaining time rests on the items of this run only, not on resumed ones.

    Args:
        total: items in all.
        done: items finished by earlier runs.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._done = self._begun_at = done
        self._clock = self._told_at = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("embedding"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                # Items differ in length, so the speed of a few seconds says little.
                TimeRemainingColumn(),
                console=messages(),
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> ItemProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def part(self, items: int) -> Iterator[Callable[[int, int], None]]:
        """Count a part, such as a shard, which is finished when the block is left.

        Yields:
            a function that takes how much of the part is done, as (done, total).
        """

        def within(done: int, total: int) -> None:
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done + items * done // total)

        yield within
        self._done += items
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if self._done < self._total and now - self._told_at < _SECONDS_BETWEEN_LINES:
            return
        self._told_at = now
        spent = now - self._clock
        left = spent / (self._done - self._begun_at) * (self._total - self._done)
        text = f"{self._done} of {self._total} items, {duration(spent)} spent"
        if left:
            text += f", about {duration(left)} left"
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
