from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from ume_models.errors import ItemError
from ume_models.processing import ImageConfig, MediaRules


def test_a_wider_limit_of_the_checkpoint_changes_nothing_and_a_smaller_one_is_honoured() -> None:
    rules = MediaRules()
    assert rules.for_checkpoint(ImageConfig(stored_max_pixels=12845056)) == rules
    assert rules.for_checkpoint(ImageConfig()) == rules
    assert rules.for_checkpoint(ImageConfig(stored_max_pixels=50176)).max_pixels == 50176


def test_given_limits_win() -> None:
    limited = MediaRules().for_checkpoint(ImageConfig(stored_max_pixels=50176), 3136, 100352)
    assert (limited.min_pixels, limited.max_pixels) == (3136, 100352)


def test_a_maximum_below_the_rules_minimum_lowers_it() -> None:
    rules = MediaRules(min_pixels=200704, max_pixels=1003520)
    limited = rules.for_checkpoint(ImageConfig(stored_max_pixels=50176))
    assert (limited.min_pixels, limited.max_pixels) == (50176, 50176)


@pytest.mark.parametrize(
    ("limits", "message"),
    [((3136, 784), "min_pixels"), ((None, 500), "one token"), ((0, None), "at least 1")],
)
def test_impossible_limits(limits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaRules().for_checkpoint(ImageConfig(), *limits)


def test_long_clips_are_thinned_out(make_processor: Any, noise: Any) -> None:
    frames = [noise(56, 56, seed) for seed in range(11)]
    chosen = [frames[position] for position in (0, 3, 6, 10)]
    thinned, plain, short = (
        make_processor(max_frames=count).plan([{"video": video}])[0].visuals[0].sources
        for count, video in ((4, frames), (None, frames), (16, frames))
    )
    assert [*thinned] == chosen
    assert [*plain] == [*short] == frames


@pytest.mark.parametrize("item", [{"images": 2}, {"video": 1}])
def test_media_that_a_model_does_not_take(make_processor: Any, item: dict[str, int]) -> None:
    [(field, count)] = item.items()
    processor = make_processor(multi_image="refuse", clips="refuse")
    with pytest.raises(ItemError, match="this model"):
        processor.plan([{field: [Image.new("RGB", (56, 56))] * count}])
