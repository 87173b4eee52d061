"""Progress on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

from ume_models.cli.terminal import log, messages, tell


class Display:
    """Bars while the block lasts, where there is a terminal and nobody asked for quiet.

    Attributes:
        bars: None where there are none; then lines are for ``is_time`` to allow.

    Args:
        seconds: between two lines.
        columns: of a bar.
        how: further arguments of ``rich.progress.Progress``.
    """

    def __init__(self, seconds: float, *columns: ProgressColumn, **how: Any) -> None:
        self._seconds = seconds
        self._told_at = time.monotonic()  # the first line after a while, too
        self.bars: Progress | None = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self.bars = Progress(*columns, console=messages(), **how)

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def is_time(self) -> bool:
        """Whether the last line was told some time ago; then this is the next one's."""
        now = time.monotonic()
        if now - self._told_at < self._seconds:
            return False
        self._told_at = now
        return True


class ItemProgress(Display):
    """Counts items. The remaining time rests on the items of this run only, not on resumed ones.

    Args:
        total: items in all.
        done: items finished by earlier runs.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        super().__init__(
            2.0,
            TextColumn("embedding"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Items differ in length, so the speed of a few seconds says little.
            TimeRemainingColumn(),
            speed_estimate_period=120,
        )
        self._total = total
        self._done = self._begun_at = done
        self._clock = time.monotonic()
        if self.bars is not None:
            self._bar = self.bars.add_task("", total=total, completed=done)

    @contextmanager
    def part(self, items: int) -> Iterator[Callable[[int, int], None]]:
        """Count a part, such as a shard, which is finished when the block is left.

        Yields:
            a function that takes how much of the part is done, as (done, total).
        """

        def within(done: int, total: int) -> None:
            if self.bars is not None:
                self.bars.update(self._bar, completed=self._done + items * done // total)

        yield within
        self._done += items
        if self.bars is not None:
            self.bars.update(self._bar, completed=self._done)
        elif self.is_time() or self._done == self._total:
            spent = time.monotonic() - self._clock
            left = spent / (self._done - self._begun_at) * (self._total - self._done)
            text = f"{self._done} of {self._total} items, {duration(spent)} spent"
            tell(text + f", about {duration(left)} left" * bool(left))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
