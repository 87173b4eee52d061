"""How sure a mean over queries is: bootstrap intervals, and a test of paired differences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
FLIPS = 10_000  # enough for p-values that stay small when corrected for 78 tasks
CONFIDENCE = 0.95
_CELLS = 4_000_000  # numbers drawn at once, so that memory stays bounded


class Interval(NamedTuple):
    """A range that holds the true mean with the probability ``CONFIDENCE``, roughly.

    Attributes:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


def resampled_means(
    values: npt.NDArray[np.float64], name: str, *, resamples: int = RESAMPLES
) -> npt.NDArray[np.float64]:
    """Means of samples drawn with replacement from the values of a task's queries.

    The same values and name give the same means. Averaging the results of several tasks gives
    the stratified bootstrap of the mean of their means.

    Args:
        values: ``[Q]``, one per query.
        name: what they are of; the seed is made of it.
        resamples: how many samples R, each of Q values.

    Returns:
        float64 ``[R]``.

    Raises:
        ValueError: there are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError(f"{name}: a mean needs at least one value")
    generator = _generator(name)
    means = np.empty(resamples)
    rows = max(1, _CELLS // count)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = values[generator.integers(0, count, (stop - start, count))].mean(axis=1)
    return means


def percentile_interval(
    means: npt.NDArray[np.float64], *, confidence: float = CONFIDENCE
) -> Interval:
    """The middle share ``confidence`` of resampled means ``[R]``."""
    outside = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [outside, 1.0 - outside])
    return Interval(float(low), float(high))


def mean_interval(values: npt.NDArray[np.float64], name: str) -> Interval:
    """Bootstrap percentile interval of the mean of ``values``, ``[Q]``; seeded by the name.

    Raises:
        ValueError: there are no values.
    """
    return percentile_interval(resampled_means(values, name))


def sign_flip_means(
    differences: npt.NDArray[np.float64], name: str, *, flips: int = FLIPS
) -> npt.NDArray[np.float64]:
    """Means of paired differences after each was given a random sign: what chance would show.

    Args:
        differences: ``[Q]``, one per query.
        name: what they are of; the seed is made of it.
        flips: how many means F.

    Returns:
        float64 ``[F]``.
    """
    generator = _generator(f"signs of {name}")
    moved = differences[differences != 0.0]
    means = np.zeros(flips)
    rows = max(1, _CELLS // max(1, len(moved)))
    for start in range(0, flips if len(moved) else 0, rows):
        stop = min(start + rows, flips)
        signs = generator.integers(0, 2, (stop - start, len(moved)), dtype=np.int8) * 2.0 - 1.0
        means[start:stop] = signs @ moved / len(differences)
    return means


def two_sided_p(mean: float, by_chance: npt.NDArray[np.float64]) -> float:
    """Share of chance's means ``[F]`` at least as far from 0 as the observed one.

    The observed one counts among them (Phipson and Smyth 2010), so it is never 0.
    """
    # Sums in another order differ in their last bits: those are equal, not closer.
    as_far = np.count_nonzero(np.abs(by_chance) >= abs(mean) * (1.0 - 1e-9))
    return float((as_far + 1) / (len(by_chance) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the given order.

    The one at rank i of m, from 0, is multiplied by m − i; none falls below one before it.
    """
    corrected = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = floor
    return corrected


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
