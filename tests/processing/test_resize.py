from __future__ import annotations

import importlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ume_models.errors import ItemError
from ume_models.processing.resize import fetch_size, model_size

# Results of qwen_vl_utils 0.0.8, vision_process.smart_resize, with its default limits.
RECORDED_FETCH_SIZES = [
    ((1, 1), (56, 56)),
    ((28, 28), (56, 56)),
    ((14, 42), (56, 112)),
    ((42, 14), (112, 56)),
    ((70, 98), (56, 112)),
    ((3, 600), (28, 588)),
    ((600, 3), (588, 28)),
    ((55, 57), (56, 56)),
    ((100, 333), (112, 336)),
    ((1000, 750), (1008, 756)),
    ((3509, 2481), (3500, 2492)),
    ((5000, 9000), (2660, 4788)),
    ((20000, 15000), (4116, 3080)),
    ((30000, 160), (29988, 168)),
    ((13, 2600), (28, 2604)),
    ((154, 126), (168, 112)),
]


@pytest.mark.parametrize(("size", "expected"), RECORDED_FETCH_SIZES)
def test_fetch_size_is_that_of_qwen_vl_utils(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fetch_size(*size, 28, 4 * 784, 16384 * 784) == expected


def transformers_smart_resize(*args: int) -> tuple[int, int]:
    package = "transformers.models.qwen2_vl"
    try:  # transformers 5, where the other module needs torchvision
        module = importlib.import_module(f"{package}.image_processing_pil_qwen2_vl")
    except ModuleNotFoundError:
        module = importlib.import_module(f"{package}.image_processing_qwen2_vl")
    size: tuple[int, int] = module.smart_resize(*args)
    return size


@pytest.mark.compat
@given(
    height=st.integers(28, 4000),
    width=st.integers(28, 4000),
    min_pixels=st.sampled_from([784, 3136, 200704]),
    max_pixels=st.sampled_from([200704, 2359296, 12845056]),
)
@example(height=42, width=70, min_pixels=784, max_pixels=200704)  # halves round to even
def test_model_size_is_that_of_transformers(
    height: int, width: int, min_pixels: int, max_pixels: int
) -> None:
    expected = transformers_smart_resize(height, width, 28, min_pixels, max_pixels)
    assert model_size(height, width, 28, min_pixels, max_pixels) == expected


@pytest.mark.parametrize("size_of", [fetch_size, model_size])
def test_aspect_ratio_above_200_is_refused_and_200_is_not(size_of: object) -> None:
    assert callable(size_of)
    assert size_of(10, 2000, 28, 784, 2359296)
    with pytest.raises(ItemError, match="more than 200 times"):
        size_of(10, 2001, 28, 784, 2359296)


def test_the_size_that_was_given_is_named() -> None:
    fetched = fetch_size(41, 6000, 28, 4 * 784, 16384 * 784)
    with pytest.raises(ItemError, match="6000x41"):
        model_size(*fetched, 28, 784, 2_359_296, given=(41, 6000))


def test_a_side_never_shrinks_to_nothing() -> None:
    assert fetch_size(28, 5600, 28, 784, 7840) == (28, 1232)
    assert model_size(28, 5600, 28, 784, 7840) == (28, 1232)


def test_extreme_shapes_by_rule() -> None:
    assert fetch_size(10, 2001, 28, 784, 2359296, "cut") == (28, 1988)
    assert fetch_size(29, 7000, 28, 784, 2359296, "cut") == (28, 5600)
    square = model_size(2001, 2001, 28, 784, 2359296)
    assert model_size(10, 2001, 28, 784, 2359296, "square") == square
    assert model_size(10, 40, 28, 784, 2359296, "square") == (28, 28)
