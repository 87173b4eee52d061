"""logits=False, and what an accelerated model says when it is used in a way it does not allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ume_models
from ume_models.errors import PatchError
from ume_models.patching import revert

pytestmark = pytest.mark.compat

ids = torch.arange(3, 20)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [True, False])
def test_generation_and_labels_are_errors(build, before, dtype):
    model = build().to(dtype)
    if before:  # the option counts on a model that was accelerated without it
        ume_models.accelerate(model)
    report = ume_models.accelerate(model, logits=False)
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 0)
    for call in (
        lambda: model(input_ids=ids, labels=ids),
        lambda: model.generate(input_ids=ids, max_new_tokens=2),
    ):
        with pytest.raises(PatchError, match=r"accelerated with logits=False; .*revert"):
            call()
    revert(report)
    assert not report.active
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert model.generate(input_ids=ids, max_new_tokens=2).shape[1] > ids.shape[1]


def test_logits_are_not_promised_back_silently(build):
    model = build()
    ume_models.accelerate(model, logits=False)
    again = ume_models.accelerate(model)
    assert "logits=False before; revert that to have logits" in " ".join(str(again).split())
    assert not again.changes


def test_the_report_knows_when_the_model_was_reverted(build):
    model = build()
    report = ume_models.accelerate(model)
    assert report.active
    assert "(reverted)" not in report.summary()
    revert(model)
    assert not report.active
    assert "(reverted)" in report.summary()
    revert(report)  # harmless


def test_replicas_of_data_parallel_are_refused(build):
    model = build()
    report = ume_models.accelerate(model)
    with pytest.raises(PatchError, match=r"DataParallel cannot take a patched .*Distributed"):
        model._replicate_for_data_parallel()  # what nn.DataParallel calls for each device
    revert(report)
    assert isinstance(model._replicate_for_data_parallel(), nn.Module)


def test_unknown_options_are_named(build):
    with pytest.raises(TypeError, match=r"options are strict, logits; got head"):
        ume_models.patching.apply(build(), head=False)
