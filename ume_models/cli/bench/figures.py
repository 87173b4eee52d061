"""One measured figure, and everything one file of results says, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["ours", "reference", "rival", "ablation"]

ROLES: tuple[Role, ...] = ("ours", "reference", "rival", "ablation")


@dataclass(frozen=True)
class Figure:
    """How long one engine took for one case.

    Attributes:
        section: kind of benchmark, such as ``"rollout"``; one table each.
        group: the case; engines of one group are compared.
        engine: what ran.
        role: this package, the reference path, what else there is, or this package without one
            of its parts: an ablation is shown, but is never the best rival.
        seconds: best round, per call; of a GPU session, the median.
        median: median round, per call; None where it was not noted.
        samples: inputs per call.
        rounds: how many there were; None where it was not noted.
        batch: rows that went through together, for plots over it.
        steps: K, for plots over it.
        floor: seconds per call below which this machine cannot go, None where not counted.
        bar: least ratio of the reference's time per sample to this one's, None where none is set.
        bar_seconds: most seconds per call, None where none is set.
        details: everything else that was noted.
    """

    section: str
    group: str
    engine: str
    role: Role
    seconds: float
    median: float | None = None
    samples: int = 1
    rounds: int | None = None
    batch: int | None = None
    steps: int | None = None
    floor: float | None = None
    bar: float | None = None
    bar_seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_sample(self) -> float:
        """Seconds per input, best round."""
        return self.seconds / self.samples

    @property
    def rate(self) -> float:
        """Inputs per second, best round."""
        return self.samples / self.seconds

    @property
    def of_floor(self) -> float | None:
        """Share of the roofline: the floor over the time."""
        return None if self.floor is None else self.floor / self.seconds


@dataclass(frozen=True)
class Results:
    """One file.

    Attributes:
        name: the file's name, for messages and captions.
        date: when it was measured, ISO 8601.
        machine: what it was measured on.
        versions: of what the figures depend on.
        figures: in the order of the file.
        tried: the sizes only showed that the benchmarks run; nothing was measured.
        session: content of a GPU session's file, else None.
        kept: what is worth keeping of the file, without names of machine and user.
    """

    name: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    figures: Sequence[Figure]
    tried: bool
    kept: Any
    session: Mapping[str, Any] | None = None

    def sections(self) -> dict[str, list[Figure]]:
        """Figures by section, in order of first appearance."""
        found: dict[str, list[Figure]] = {}
        for figure in self.figures:
            found.setdefault(figure.section, []).append(figure)
        return found


def groups(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Figures by group, in order of first appearance; in the order of ``ROLES``."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.group, []).append(figure)
    return {
        name: sorted(members, key=lambda f: ROLES.index(f.role)) for name, members in found.items()
    }


def best(figures: Sequence[Figure], role: Role) -> Figure | None:
    """The fastest per sample of a role; None where the group has none."""
    members = [figure for figure in figures if figure.role == role]
    return min(members, key=lambda figure: figure.per_sample, default=None)
