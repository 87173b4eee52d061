"""Sizes that batches are rounded up to, so that a few CUDA graphs serve all of them."""

from __future__ import annotations

from bisect import bisect_left

BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows; above, multiples of 32."""

MIN_CAPACITY = 64
"""Tokens; every capacity is a multiple of it."""


def batch_bucket(rows: int) -> int:
    """The smallest bucket of at least ``rows`` rows.

    Raises:
        ValueError: ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"a batch has at least one row, got {rows}")
    if rows > BATCH_BUCKETS[-1]:
        return -(-rows // 32) * 32
    return BATCH_BUCKETS[bisect_left(BATCH_BUCKETS, rows)]


def capacity_bucket(length: int) -> int:
    """The smallest bucket of at least ``length`` tokens: four even steps per doubling.

    At most a quarter more than needed above 256 tokens; below, multiples of 64.

    Raises:
        ValueError: ``length`` is not positive.
    """
    if length < 1:
        raise ValueError(f"a row has at least one token, got {length}")
    octave = 1 << ((length - 1).bit_length() - 1) if length > 1 else 1
    step = max(MIN_CAPACITY, octave // 4)
    return -(-length // step) * step
