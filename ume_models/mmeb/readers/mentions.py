"""Collecting candidates as queries mention them, a thousand per query and mostly the same ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

from ume_models.mmeb.dataset import ListedCandidates
from ume_models.processing.items import Item


class Mentions:
    """The candidates of a task in the order in which they are first mentioned."""

    def __init__(self) -> None:
        self._contents: dict[str, Hashable] = {}
        self._items: list[tuple[str, Item]] = []
        self._clashing: dict[str, Item] = {}
        self._names: dict[str, str] = {}
        self._lists: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(self, name: str, content: Hashable, item: Callable[[], Item]) -> None:
        """Mention a candidate.

        Args:
            name: its name.
            content: stands for what it contains; another content under a known name is a clash.
            item: makes it; called for the first mention only, and for a clash.
        """
        if name not in self._contents:
            self._contents[name] = content
            self._items.append((name, item()))
        elif self._contents[name] != content and name not in self._clashing:
            self._clashing[name] = item()

    def add_text(self, name: str, text: str) -> None:
        """Mention a candidate that is a text."""
        self.add(name, text, partial(Item, text, id=name))

    def names(self, names: Sequence[str]) -> tuple[str, ...]:
        """A query's candidates, as strings that all queries share."""
        shared = tuple(self._names.setdefault(name, name) for name in names)
        return self._lists.setdefault(shared, shared)

    def candidates(self) -> ListedCandidates:
        """All candidates mentioned; the first content of every name counts."""
        return ListedCandidates([*self._items, *self._clashing.items()])
