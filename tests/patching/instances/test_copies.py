"""Copies and files of patched models, and applying and reverting more than once."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from ume_models.errors import PatchError
from ume_models.patching import apply, revert
from ume_models.patching.changes import InstanceForward

pytestmark = pytest.mark.compat

ids = torch.arange(3, 20)[None]


def replaced(model):
    """Every replacement on a model and its parts."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, InstanceForward)]


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_copies_are_patched_models_of_their_own(model, way):
    apply(model)
    expected = model(input_ids=ids).logits
    other = WAYS[way](model)
    assert len(replaced(other)) == len(replaced(model)) > 0
    assert {id(r.module) for r in replaced(other)} <= {id(m) for m in other.modules()}
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(other(input_ids=ids).logits, expected)
    again = apply(other)
    assert not again.changes
    revert(other)
    assert not replaced(other)
    assert replaced(model)
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_twice_is_harmless(model):
    first = apply(model)
    held = replaced(model)
    second = apply(model)
    assert not second.changes
    assert not second.replaced
    assert not second.repaired
    assert any("already replaced by this package" in e.reason for e in second.left_alone)
    assert replaced(model) == held
    revert(second)
    assert replaced(model) == held
    revert(first)
    revert(first)
    assert not replaced(model)
    assert not first.active


def test_apply_again_takes_what_became_possible(build):
    model = build(dtype=torch.float16)  # linear layers in float16 are PyTorch's
    first = apply(model)
    model.bfloat16()
    second = apply(model, logits=False)
    assert [e.target for e in second.replaced if e.target == "lm_head"]
    revert(second)
    assert len(replaced(model)) == len(first.changes)
    revert(first)
    assert not replaced(model)


def test_revert_refuses_to_drop_what_somebody_else_put_there(build):
    model = build()
    report = apply(model)
    module = next(r.module for r in replaced(model) if vars(r.module).get("forward") is r)
    theirs = vars(module)["forward"] = lambda *args: None
    with pytest.raises(PatchError, match="cannot be reverted"):
        revert(report)
    assert vars(module)["forward"] is theirs
    assert len(replaced(model)) == len(report.changes) - 1
