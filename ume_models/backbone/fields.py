"""Fields of a checkpoint's JSON files, checked where they are read: nothing odd gets further."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ume_models.errors import CheckpointError
from ume_models.json_files import read_object

_AGAIN = "compare the file with the original's, or copy it again"


@dataclass(frozen=True)
class Rule:
    """What a field must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, Mapping))


def whole(low: int = 1, high: int = 10**6) -> Rule:
    """A whole number in a range, both ends included."""
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def real(low: float, high: float) -> Rule:
    """A number in a range, both ends included; never NaN."""
    return Rule(
        f"a number from {low} to {high}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def one_of(choices: Sequence[object]) -> Rule:
    """One of a few values."""
    return Rule(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def several(rule: Rule, count: int | None = None) -> Rule:
    """A list, where every entry is as ``rule`` says; ``count`` is its length, None for any."""
    return Rule(
        f"a list of {count or 'any number of'} entries, each {rule.words}",
        lambda value: (
            isinstance(value, (list, tuple))
            and count in (None, len(value))
            and all(map(rule.fits, value))
        ),
    )


def field(
    content: Mapping[str, Any], source: str, name: str, rule: Rule, default: Any = None
) -> Any:
    """The value of a field.

    Args:
        content: the object that has it.
        source: the file and the place in it, for the message.
        name: the field's.
        rule: what it must be.
        default: its value where it is absent. A ``null`` is a value.

    Raises:
        CheckpointError: it is something else.
    """
    value = content.get(name, default)
    if not rule.fits(value):
        raise CheckpointError(
            f"{source}: {name} is {reprlib.repr(value)}; it must be {rule.words}; {_AGAIN}"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read as one.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_AGAIN}") from None
