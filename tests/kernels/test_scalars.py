"""NumPy's scalars are numbers like Python's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ume_kernels
from ume_kernels.similarity_topk import similarity_topk

EYE = torch.eye(4)


def test_of_the_search() -> None:
    for ours, same in zip(
        similarity_topk(EYE, EYE, np.int64(2), block=np.int32(256)),  # type: ignore[arg-type]
        similarity_topk(EYE, EYE, 2),
        strict=True,
    ):
        assert torch.equal(ours, same)
    with pytest.raises(ValueError, match="k must be"):
        similarity_topk(EYE, EYE, np.bool_(True))  # type: ignore[arg-type]


def test_of_the_loss() -> None:
    options = {"scale": np.float32(2), "row_offset": np.int64(1), "ignore": np.float64(0.5)}
    loss = ume_kernels.contrastive_loss(EYE[:3], EYE, **options)  # type: ignore[arg-type]
    same = ume_kernels.contrastive_loss(EYE[:3], EYE, scale=2, row_offset=1, ignore=0.5)
    assert torch.equal(loss, same)


def test_of_the_transition() -> None:
    module = ume_kernels.MoETransition(16)
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    excluded = np.array([1])
    got, _ = module(z, step_id=np.int64(3), excluded=excluded)
    same, _ = module(z, step_id=3, excluded=[1])
    assert torch.equal(got, same)


def test_of_lists_of_rows() -> None:
    class Labelled:
        """A sequence that is looked up by label, as a pandas Series is."""

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return np.array([2, 0])

        def __len__(self) -> int:
            return 2

        def __getitem__(self, label: int) -> int:
            return {0: 0, 1: 1}[label]

    _, rows = similarity_topk(EYE[:1] + 1, EYE, 2, segments=[Labelled()])
    assert rows.tolist() == [[0, 2]]
