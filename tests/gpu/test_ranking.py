"""Ranking on a GPU: the order of a stable sort of the same scores."""

from __future__ import annotations

import numpy as np
import pytest

from ume_models.patching.ranked import RankedRows, _gpu_has_room, _OnCuda

pytestmark = pytest.mark.gpu


def test_order_is_that_of_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    queries = generator.standard_normal((70, 64), dtype=np.float32)
    candidates = generator.standard_normal((5000, 64), dtype=np.float32)
    candidates[11], candidates[100] = candidates[7], np.nan
    scores = queries @ candidates.T
    with _OnCuda(candidates.T) as sorter:
        assert _gpu_has_room(RankedRows(queries, candidates.T))
        found = sorter.order(queries)
    assert found.dtype == np.int64
    assert (found[:, -1] == 100).all()
    scores[:, 100] = -np.inf
    in_order = np.take_along_axis(scores, found, axis=1)[:, :-1]
    assert (np.diff(in_order, axis=1) <= 1e-4).all()
    assert (np.sort(found, axis=1) == np.arange(5000)).all()
    places = np.argsort(found, axis=1)
    assert (places[:, 7] + 1 == places[:, 11]).all()
