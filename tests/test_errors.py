"""Errors keep their kind on every way to the caller, and each kind has one HTTP status."""

from __future__ import annotations

import pickle
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ume_models import errors
from ume_models.encode import encode_detailed
from ume_models.errors import DataError, ErrorKind, ItemError, OptionError, StoreError, UmeError


@pytest.fixture(scope="module")
def model(load_recorded: Any) -> Any:
    return load_recorded(engine="fast")


def test_every_kind_has_an_error_status() -> None:
    for kind in ErrorKind:
        assert HTTPStatus(kind.status).value >= 400
        assert ErrorKind(kind.value) is kind
    assert len({kind.value for kind in ErrorKind}) == len(ErrorKind)


@pytest.mark.parametrize(
    "error",
    [
        UmeError("a", remedy="b", kind=ErrorKind.NOT_FINITE),
        StoreError("a", kind=ErrorKind.HELD),
        DataError("a", task="b"),
        OptionError("a"),
        ItemError("a", 3, "x", kind=ErrorKind.TOO_LONG),
    ],
    ids=lambda error: type(error).__name__,
)
def test_processes_can_send_errors_to_each_other(error: UmeError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert again.kind is error.kind


def test_an_option_that_is_wrong_is_a_value_error_too() -> None:
    assert issubclass(OptionError, ValueError) and OptionError.kind is ErrorKind.OPTION


def test_every_class_has_a_kind() -> None:
    found = {name: each for name, each in vars(errors).items() if name.endswith("Error")}
    assert len(found) > 5
    assert all(isinstance(each.kind, ErrorKind) for each in found.values())


# -- on the way through encode -------------------------------------------------------------------


def kind_of(model: Any, item: dict[str, Any], **options: Any) -> ErrorKind:
    """The kind of an item's error, which must be the same however it is told."""
    with pytest.raises(ItemError) as caught:
        encode_detailed(model, [{"text": "a"}, item], **options)
    assert caught.value.index == 1
    [told] = encode_detailed(model, [{"text": "a"}, item], on_error="skip", **options).errors
    assert (told.kind, told.index) == (caught.value.kind, 1)
    return told.kind


def test_kinds_of_items_that_cannot_be_planned(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (28, 28))
    assert kind_of(model, {"images": [image, image]}) is ErrorKind.NEEDS_CHOICE
    assert kind_of(model, {"image": str(tmp_path / "none.png")}) is ErrorKind.BAD_ITEM
    assert kind_of(model, {"text": "a " * 5000}) is ErrorKind.TOO_LONG
    monkeypatch.setattr(model.processor, "max_image_pixels", 100)
    assert kind_of(model, {"image": image}) is ErrorKind.TOO_LARGE


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FloatingPointError("an embedding is not finite"), ErrorKind.NOT_FINITE),
        (MemoryError(), ErrorKind.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("full"), ErrorKind.OUT_OF_MEMORY),
    ],
)
def test_kinds_of_items_that_the_model_cannot_do(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: ErrorKind
) -> None:
    embed = model.embed_prepared

    def fails_for_the_long_one(batch: Any, options: Any) -> Any:
        if max(item.input_ids.numel() for item in batch) > 100:
            raise error
        return embed(batch, options)

    monkeypatch.setattr(model, "embed_prepared", fails_for_the_long_one)
    assert kind_of(model, {"text": "b " * 200}) is kind


def test_wrong_options(model: Any) -> None:
    for options in ({"mode": "x"}, {"batch_tokens": 0}, {"on_error": "x"}, {"latent_steps": -1},
                    {"workers": -1}, {"context": "x"}):  # fmt: skip
        with pytest.raises(OptionError):
            encode_detailed(model, [{"text": "a"}], **options)  # type: ignore[arg-type]
