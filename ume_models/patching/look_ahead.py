"""A loader read some samples ahead of the loop that consumes it.

A loop that takes one sample at a time still says which samples come next: they are in its loader.
"""

from __future__ import annotations

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


class LookAhead:
    """Yields what a loader yields, in its order, but reads some samples before they are asked for.

    An error of the loader is raised where it would have been: after the samples before it.

    Args:
        loader: yields ``(inputs, infos)``, inputs in processor layout.
        samples, tokens: read at most so many ahead (the sample that exceeds ``tokens`` included).

    Attributes:
        coming: inputs of the sample yielded last and of those read behind it.
        chunk: number of the chunk they belong to.
    """

    def __init__(self, loader: Iterable[Any], samples: int = SAMPLES, tokens: int = TOKENS) -> None:
        self.loader = loader
        self.samples = samples
        self.tokens = tokens
        self.coming: list[Any] = []
        self.chunk = 0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set: copying and unpickling ask before
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.loader)
        error: Exception | None = None
        while error is None:
            chunk: list[Any] = []
            tokens = 0
            while len(chunk) < self.samples and tokens < self.tokens:
                try:
                    item = next(source)
                except Exception as raised:
                    error = raised
                    break
                chunk.append(item)
                size = _size(item)
                tokens += self.tokens if size is None else size
            self.chunk += 1
            self.coming = [_inputs(item) for item in chunk]
            for item in chunk:
                yield item
                self.coming = self.coming[1:]
        if not isinstance(error, StopIteration):
            raise error


def _inputs(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and item else None


def _size(item: Any) -> int | None:
    """Tokens of a sample; None for what is not known here, which is not read ahead."""
    inputs = _inputs(item)
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return ids.numel() if isinstance(ids, torch.Tensor) else None
