"""What stands for numpy's own functions while a pickle is read: plain arrays and nothing else.

A pickle of an array names functions of numpy, with arguments that decide about memory. Here they
are replaced by ones that take the forms numpy writes for numbers and strings, and refuse the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[fiub][1248]|U\d{1,9}")


class _Type:
    """A dtype of numbers or strings."""

    def __init__(self, code: str, *flags: bool) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ValueError(f"it holds values of type {code!r}, and only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"it holds values of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array whose values come later."""

    def __init__(self, *shape: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, columns_first, data = state
        self.values = _values(data, kind, shape, "F" if columns_first else "C")


def _values(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)):
        raise ValueError("it holds an array of other things than numbers")
    return np.frombuffer(data, dtype=kind.dtype).reshape(shape, order=order)


# Classes, not functions: a pickle may set attributes of a function that it names.
class _Buffer(_Array):
    """An array with its values."""

    def __init__(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        self.values = _values(data, kind, shape, order)


class _Scalar:
    """Calling it gives the number or string itself."""

    def __new__(cls, kind: Any, data: Any) -> Any:
        return _values(data, kind, (), "C")[()]

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a number")


# numpy 2 renamed the modules; pickles of either are read with either.
STAND_INS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _Buffer),
        )
    },
}


def plain(value: Any) -> Any:
    """The array that a stand-in holds, also as a value of a mapping; anything else as it is."""
    if isinstance(value, dict):
        return {key: _held(one) for key, one in value.items()}
    return _held(value)


def _held(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value
