"""Weights on huge pages are the same weights."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from ume_kernels.huge_pages import HUGE_PAGE, on_huge_pages, parameters_on_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux maps huge pages on request")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_has_the_same_values_and_is_aligned(dtype: torch.dtype) -> None:
    tensor = torch.randn(1500, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for source in (tensor, tensor.T):
        copy = on_huge_pages(source)
        assert torch.equal(copy, source)
        assert copy.is_contiguous()
        assert copy.data_ptr() != source.data_ptr()
        assert copy.data_ptr() % HUGE_PAGE == 0


def test_memory_lives_as_long_as_a_view() -> None:
    row = on_huge_pages(torch.full((2000, 1000), 3.0))[1999]
    gc.collect()
    assert (row == 3).all()


def test_leaves_the_rest_alone() -> None:
    small = torch.zeros(10)
    assert on_huge_pages(small) is small
    meta = torch.zeros(2000, 1000, device="meta")
    assert on_huge_pages(meta) is meta


def test_module_keeps_its_parameters_and_ties() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000))
    model[1].weight = model[0].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight, bias = model[0].weight, model[0].bias.data_ptr()
    assert parameters_on_huge_pages(model) == 4_000_000
    assert model[0].weight is weight
    assert model[1].weight is weight
    assert weight.data_ptr() % HUGE_PAGE == 0
    assert model[0].bias.data_ptr() == bias
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
