"""The pictures training is made of: deterministic, and split without a leak."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.support.bundled.families import FAMILIES, Family
from tests.support.bundled.families.digits import digit_images, digit_indices

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@every_family
def test_specs_are_distinct_and_described_by_their_attributes(family: Family) -> None:
    specs = list(family.specs())
    assert len(set(map(family.key, specs))) == len(specs)
    assert len({family.attributes(spec) for spec in specs}) == len(specs)
    for spec in specs:
        values = family.attributes(spec)
        assert len(values) == len(family.slots)
        assert all(0 <= v < n for v, n in zip(values, family.slots, strict=True))


@every_family
def test_split_is_disjoint_and_complete(family: Family) -> None:
    seen, held_out = family.split(held_out=False), family.split(held_out=True)
    assert not set(seen) & set(held_out)
    assert set(seen) | set(held_out) == set(family.specs())
    assert 0.08 < len(held_out) / len(family.specs()) < 0.25


@every_family
def test_every_attribute_value_occurs_in_training(family: Family) -> None:
    # A held-out combination is new, its parts are not: else it could not be recognised.
    attributes = np.array([family.attributes(spec) for spec in family.split(held_out=False)])
    for column, count in enumerate(family.slots):
        assert set(attributes[:, column]) == set(range(count))


@every_family
def test_captions_tell_specs_apart(family: Family) -> None:
    owners: dict[str, tuple[int, ...]] = {}
    rng = Random(0)
    for spec in family.specs():
        for _ in range(4):
            assert owners.setdefault(family.caption(spec, rng), spec) == spec


@every_family
def test_pictures_follow_from_the_seed(family: Family) -> None:
    spec = family.specs()[3]

    def draw(seed: int) -> np.ndarray:
        frames = family.render(spec, Random(seed), False)
        return np.stack([np.asarray(frame) for frame in frames])

    assert np.array_equal(draw(5), draw(5))
    assert not np.array_equal(draw(5), draw(6))
    assert draw(5).shape == (family.frames, family.size[1], family.size[0], 3)
    # Multiples of the merged patch and large enough: no preprocessor resizes them.
    assert all(side % 28 == 0 and side >= 56 for side in family.size)


def test_held_out_digits_are_other_pictures() -> None:
    seen = {i for indices in digit_indices(False) for i in indices}
    held_out = {i for indices in digit_indices(True) for i in indices}
    assert not seen & held_out
    assert seen | held_out == set(range(1797))
    labels = digit_images()[1]
    for digit in range(10):
        assert len(digit_indices(True)[digit]) >= 20
        assert all(labels[i] == digit for i in digit_indices(True)[digit])


def test_numbers_are_drawn_from_the_asked_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.bundled.families import digits

    asked: list[bool] = []
    original = digits.digit_indices
    monkeypatch.setattr(
        digits, "digit_indices", lambda held_out: asked.append(held_out) or original(held_out)
    )
    for name, spec in (("digits", (4, 2)), ("clip", (1, 4, 2))):
        for held_out in (False, True):
            asked.clear()
            FAMILIES[name].render(spec, Random(0), held_out)
            assert asked == [held_out, held_out]
