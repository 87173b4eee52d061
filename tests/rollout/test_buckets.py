"""Buckets cover every size, waste little, and are few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ume_models.rollout.buckets import BATCH_BUCKETS, batch_bucket, capacity_bucket


@given(st.integers(1, 5000))
def test_batch_buckets(rows):
    bucket = batch_bucket(rows)
    assert bucket >= rows
    assert batch_bucket(bucket) == bucket
    assert batch_bucket(rows + 1) >= bucket
    assert bucket in BATCH_BUCKETS or bucket % 32 == 0
    assert bucket <= max(2 * rows - 1, 1) if rows <= 16 else bucket < 1.5 * rows


@given(st.integers(1, 200_000))
def test_capacity_buckets(length):
    bucket = capacity_bucket(length)
    assert bucket >= max(length, 64)
    assert bucket % 64 == 0
    assert capacity_bucket(bucket) == bucket
    assert capacity_bucket(length + 1) >= bucket
    assert bucket - length < max(64, length / 4)


def test_a_doubling_has_four_capacities():
    assert {capacity_bucket(n) for n in range(1025, 2049)} == {1280, 1536, 1792, 2048}
    assert len({capacity_bucket(n) for n in range(1, 32769)}) <= 32


@pytest.mark.parametrize("bucket", [batch_bucket, capacity_bucket])
def test_nothing_has_no_bucket(bucket):
    with pytest.raises(ValueError, match="at least one"):
        bucket(0)
