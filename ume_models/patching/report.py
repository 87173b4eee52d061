"""What a patch did, target by target: a table for people, JSON for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ume_models.patching.changes import Change

Action = Literal["replaced", "repaired", "left alone", "missing"]
ACTIONS: tuple[Action, ...] = ("repaired", "replaced", "left alone", "missing")


@dataclass(frozen=True)
class Entry:
    """One target.

    Attributes:
        target: dotted name; ``*`` stands for the layers of a stack, with their number behind it.
        action: ``"replaced"`` by something faster with the same numbers, ``"repaired"`` where the
            original gives wrong ones, ``"left alone"``, or ``"missing"``.
        by: what stands there now.
        reason: what it does, or why nothing was done.
        unknown: left alone or missing because this version of it is not known.
    """

    target: str
    action: Action
    by: str = ""
    reason: str = ""
    unknown: bool = False


class PatchReport:
    """Everything ``apply`` did to one subject. ``str(report)`` is a table.

    Args:
        subject: the model's class or the repository's modules.
        recipe: which recipe was used.
        entries: target by target.
        changes: what ``revert`` takes back.
        planned: nothing was done: these are the entries of what would be.
    """

    def __init__(
        self,
        subject: str,
        recipe: str,
        entries: Sequence[Entry],
        changes: Sequence[Change] = (),
        planned: bool = False,
    ) -> None:
        self.subject = subject
        self.recipe = recipe
        self.entries = tuple(entries)
        self.changes = tuple(changes)
        self.planned = planned

    @property
    def active(self) -> bool:
        """Whether the changes are in force: there are some, and they were not taken back."""
        return any(change.current() is change.new for change in self.changes)

    def _of(self, action: Action) -> list[Entry]:
        return [entry for entry in self.entries if entry.action == action]

    @property
    def replaced(self) -> list[Entry]:
        """Targets with a faster implementation of the same numbers."""
        return self._of("replaced")

    @property
    def repaired(self) -> list[Entry]:
        """Targets whose numbers were wrong."""
        return self._of("repaired")

    @property
    def left_alone(self) -> list[Entry]:
        """Targets that were looked at and not changed."""
        return self._of("left alone")

    @property
    def missing(self) -> list[Entry]:
        """Targets that do not exist or look otherwise than expected (``strict=False``)."""
        return self._of("missing")

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable content."""
        return {
            "subject": self.subject,
            "recipe": self.recipe,
            "active": self.active,
            "entries": [asdict(entry) for entry in self.entries],
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)

    def summary(self) -> str:
        """One line: how many targets were repaired, replaced, left alone, missing."""
        counts = Counter(entry.action for entry in self.entries)
        told = ", ".join(f"{counts[action]} {action}" for action in ACTIONS if counts[action])
        done = self.changes or self.replaced or self.repaired
        state = "" if done or self.planned else " (nothing was changed)"
        state = " (reverted)" if self.changes and not self.active else state
        would = "would have " if self.planned else ""
        return f"{self.subject} ({self.recipe}): {would}{told or 'nothing to do'}{state}"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        # As wide as its lines need: logs and files have no terminal to fit into.
        console = Console(file=out, width=100, no_color=True, highlight=False, soft_wrap=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("action", no_wrap=True)
        table.add_column("target", overflow="fold", ratio=2)
        table.add_column("by, and why", overflow="fold", ratio=3)
        for action in ACTIONS:
            for entry in self._of(action):
                told = ": ".join(part for part in (entry.by, entry.reason) if part)
                table.add_row(action, escape(entry.target), escape(told))
        return Group(escape(self.summary()), table) if self.entries else escape(self.summary())

    def __repr__(self) -> str:
        return f"<PatchReport {self.summary()}>"
