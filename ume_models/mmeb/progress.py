"""What a running evaluation tells, and an estimate that rests on what this run has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ume_models.mmeb.keys import KINDS, Kind
from ume_models.mmeb.results import TaskScore
from ume_models.mmeb.team import Team


@dataclass(frozen=True)
class Remaining:
    """How long an evaluation still takes.

    Attributes:
        seconds: for the input classes that were measured; None before the first measurement.
        unmeasured: classes with items left of which this run has embedded none yet; they come on
            top and nothing is known of them.
    """

    seconds: float | None
    unmeasured: Sequence[Kind]


class Progress:
    """Receives what happens; this one ignores it."""

    def reading(self, task: str, number: int, of: int) -> None:
        """A task's tables and media are being read; so many of all tasks have been."""

    def planned(self, totals: Mapping[Kind, int], done: Mapping[Kind, int]) -> None:
        """Items to embed in all, and those that earlier runs did."""

    def embedding(self, kind: Kind, done: int, items: int) -> None:
        """Items of the shard at hand that are finished."""

    def embedded(self, done: Mapping[Kind, int], remaining: Remaining) -> None:
        """A shard is written; counts are those of all processes and runs."""

    def scored(self, score: TaskScore) -> None:
        """A task has its score."""

    def note(self, text: str) -> None:
        """A sentence for the user."""


class Pace:
    """Items and seconds of all processes of this run, by input class."""

    def __init__(
        self, team: Team, totals: Mapping[Kind, int], done_before: Mapping[Kind, int]
    ) -> None:
        self._team = team
        self._totals = totals
        self._before = done_before

    def add(self, kind: Kind, items: int, seconds: float) -> None:
        """Count a shard."""
        self._team.tally(f"milliseconds/{kind}", max(1, round(seconds * 1000)))
        self._team.tally(f"items/{kind}", items)

    def done(self) -> dict[Kind, int]:
        """Items that are finished, by class."""
        return {kind: self._before[kind] + self._team.tally(f"items/{kind}") for kind in KINDS}

    def remaining(self) -> Remaining:
        """The rest at the pace of each class in this run, spread over the processes."""
        done, seconds, measured, unmeasured = self.done(), 0.0, False, []
        for kind in KINDS:
            left = self._totals[kind] - done[kind]
            items = self._team.tally(f"items/{kind}")
            if items:
                measured = True
                seconds += left * self._team.tally(f"milliseconds/{kind}") / 1000 / items
            elif left:
                unmeasured.append(kind)
        return Remaining(seconds / self._team.size if measured else None, unmeasured)
