"""A loader read some samples ahead of the loop that consumes it.

A loop that takes one sample at a time still says which samples come next: they are in its loader.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

SAMPLES = 64
TOKENS = 16384
"""Bounds of what is read ahead: pixel values of the samples wait in memory."""


def limits() -> tuple[int, int]:
    """Samples and tokens to read ahead: UME_LOOK_AHEAD (1: one at a time), UME_LOOK_AHEAD_TOKENS.

    Raises:
        ValueError: a variable is not a positive whole number.
    """
    found = []
    for name, default in (("UME_LOOK_AHEAD", SAMPLES), ("UME_LOOK_AHEAD_TOKENS", TOKENS)):
        text = os.environ.get(name, "").strip() or str(default)
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{name}={text!r}; give a whole number of at least 1")
        found.append(int(text))
    return found[0], found[1]


class Snapshot:
    """Inputs as they were when they were read, to notice what is done to them afterwards.

    Args:
        inputs: in processor layout; held, not copied.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = dict(inputs)
        self._versions = {k: _version(v) for k, v in self.inputs.items()}

    def untouched(self, name: str) -> bool:
        """Whether nobody has written into the tensor since."""
        return self._versions.get(name) == _version(self.inputs.get(name))


def _version(value: Any) -> int | None:
    tracked = isinstance(value, torch.Tensor) and not value.is_inference()
    return value._version if tracked else None


def _copied(item: Any) -> Any:
    """A sample with inputs of its own."""
    inputs = copy.copy(item[0])
    for name, value in item[0].items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.clone()
    return (inputs, *item[1:])


class LookAhead:
    """Yields what a loader yields, in its order, but reads some samples before they are asked for.

    An error of the loader is raised where it would have been: after the samples before it. A loader
    that fills the same object or memory again for each sample is noticed at its second one, and
    from then on read one sample at a time.

    Args:
        loader: yields ``(inputs, infos)``, inputs in processor layout.
        samples, tokens: read at most so many ahead (the sample that exceeds ``tokens`` included).

    Attributes:
        coming: snapshots of the inputs of the sample yielded last and of those read behind it;
            None for what is no sample.
        chunk: number of the chunk they belong to.
    """

    def __init__(self, loader: Iterable[Any], samples: int = SAMPLES, tokens: int = TOKENS) -> None:
        self.loader = loader
        self.samples = samples
        self.tokens = tokens
        self.coming: list[Snapshot | None] = []
        self.chunk = 0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set: copying and unpickling ask before
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.loader)
        samples = self.samples
        error: Exception | None = None
        while error is None:
            chunk: list[Any] = []
            tokens = 0
            spares: dict[int, Any] = {}  # copies of the samples that share memory with the last
            while len(chunk) < samples and tokens < self.tokens:
                try:
                    item = next(source)
                except Exception as raised:
                    error = raised
                    break
                if not (chunk and _shared(chunk[-1], item)):
                    spares = {}
                elif not _same(chunk[-1], spares[len(chunk) - 1]) or item[0] is chunk[-1][0]:
                    for number, spare in spares.items():
                        chunk[number] = spare
                    samples = 1
                chunk.append(item)
                if isinstance(_inputs(item), Mapping):
                    spares[len(chunk) - 1] = _copied(item)
                size = _size(item)
                tokens += self.tokens if size is None else size
            self.chunk += 1
            self.coming = [_snapshot(item) for item in chunk]
            for item in chunk:
                yield item
                self.coming = self.coming[1:]
        if not isinstance(error, StopIteration):
            raise error


def _snapshot(item: Any) -> Snapshot | None:
    inputs = _inputs(item)
    return Snapshot(inputs) if isinstance(inputs, Mapping) else None


def _shared(earlier: Any, later: Any) -> bool:
    """Whether two samples are the same object, or have tensors in the same memory."""
    mine, theirs = _inputs(earlier), _inputs(later)
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return False
    places = {v.data_ptr() for v in mine.values() if _filled(v)}
    return mine is theirs or any(v.data_ptr() in places for v in theirs.values() if _filled(v))


def _filled(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors of two samples are equal."""
    return all(
        torch.equal(value, other[0][name]) if isinstance(value, torch.Tensor) else True
        for name, value in one[0].items()
    )


def _inputs(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and item else None


def _size(item: Any) -> int | None:
    """Tokens of a sample; None for what is not known here, which is not read ahead."""
    inputs = _inputs(item)
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return ids.numel() if isinstance(ids, torch.Tensor) else None
