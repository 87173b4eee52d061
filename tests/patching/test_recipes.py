"""Changes, recipes and reports: what is verified, set, told and taken back."""

from __future__ import annotations

import copy
import json
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ume_kernels.dispatch import BackendError
from ume_models.errors import PatchError
from ume_models.patching.changes import Change, InstanceForward, commit, undo
from ume_models.patching.recipes import Recipe, Target, difference, plan
from ume_models.patching.report import Entry, PatchReport

SOURCE = '''
def rank(scores, k):
    """The k best."""
    return sorted(scores)[::-1][:k]

def evaluate(scores):
    return rank(scores, 2)

class Loss:
    scale = 2.0

    def __call__(self, x, y, reduction="mean"):
        return self.scale * (x - y)

    @staticmethod
    def gather(t):
        return [t]

class Derived(Loss):
    pass
'''


def module_of(name: str, source: str = SOURCE) -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


def doubling(original: Any) -> Any:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * 2

    return replacement


RECIPE = Recipe(
    name="toy",
    modules=("toy.losses",),
    marks=("Loss", "rank"),
    targets=(
        Target("rank", ("scores", "k"), doubling, "doubled", "why not", only_adds=True),
        Target("Loss.__call__", ("self", "x", "y"), doubling, "doubled loss", only_adds=True),
    ),
    left_alone=(Entry("toy.losses.Loss.gather", "left alone", reason="nothing to gain"),),
)


def applied(module: ModuleType, recipe: Recipe = RECIPE, **options: Any) -> PatchReport:
    changes, entries = plan(recipe, module, **options)
    commit(changes)
    return PatchReport(module.__name__, recipe.name, entries, changes)


def test_targets_are_replaced_and_put_back() -> None:
    module = module_of("toy.losses")
    before = dict(vars(module)), dict(vars(module.Loss))
    report = applied(module)
    assert module.evaluate([1, 3, 2]) == [3, 2, 3, 2]
    assert module.Loss()(3, 1) == 8
    assert module.Derived()(3, 1) == 8
    assert "__call__" not in vars(module.Derived)
    undo(report.changes)
    assert (dict(vars(module)), dict(vars(module.Loss))) == before
    assert module.rank is before[0]["rank"]


def test_another_module_that_imported_the_function_is_rebound_and_told() -> None:
    module, importer, stranger = (module_of(name) for name in ("toy.losses", "toy.run", "other"))
    importer.best = module.rank  # type: ignore[attr-defined]
    stranger.best = module.rank  # type: ignore[attr-defined]
    report = applied(module, importers=[importer])
    assert importer.best([1, 2, 3], 1) == [3, 3]  # type: ignore[attr-defined]
    assert stranger.best([1, 2, 3], 1) == [3]  # type: ignore[attr-defined]
    assert "toy.run.best" in [entry.target for entry in report.replaced]
    original = stranger.best  # type: ignore[attr-defined]
    undo(report.changes)
    assert importer.best is original  # type: ignore[attr-defined]


def test_twice_is_harmless() -> None:
    module = module_of("toy.losses")
    applied(module)
    again, entries = plan(RECIPE, module)
    assert not again
    assert [e.action for e in entries] == ["left alone"] * 3
    assert module.evaluate([1, 3, 2]) == [3, 2, 3, 2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("del rank", "toy.losses.rank: it does not exist"),
        ("def rank(scores): return 1", "parameter 2 is nothing, expected 'k'"),
        ("rank = 3", "it is of type int, not a function"),
        ("from json import dumps as rank", "parameter 1"),
        ("del Loss.__call__", "toy.losses.Loss.__call__: it does not exist"),
    ],
)
def test_a_target_that_is_not_as_expected(change: str, complaint: str) -> None:
    module = module_of("toy.losses", SOURCE + change)
    before = dict(vars(module)), dict(vars(module.Loss))
    with pytest.raises(PatchError, match=complaint):
        plan(RECIPE, module)
    report = applied(module, strict=False)
    assert len(report.missing) == 1
    assert len(report.replaced) == 1
    undo(report.changes)
    assert (dict(vars(module)), dict(vars(module.Loss))) == before


def test_somebody_elses_replacement_is_an_error() -> None:
    module, other = module_of("toy.losses"), module_of("fast_library")
    module.rank = other.rank
    with pytest.raises(PatchError, match=r"toy\.losses\.rank: it was replaced by fast_library"):
        plan(RECIPE, module)


def tried(trial: Any) -> Recipe:
    targets = (Target("rank", ("scores", "k"), doubling, "x", trial=trial), RECIPE.targets[1])
    return Recipe("toy", ("m",), (), targets)


def failing(original: Any, replacement: Any) -> str:
    raise KeyError("scale")


@pytest.mark.parametrize(
    ("trial", "complaint"),
    [
        (
            lambda old, new: difference(len(old([2], 1)), len(new([2], 1))),
            r"\(difference 1\.0e\+00",
        ),
        (failing, r"it cannot be tried \(KeyError: 'scale'\)"),
    ],
)
def test_what_computes_something_else_is_never_replaced(trial, complaint) -> None:
    module = module_of("toy.losses")
    before = dict(vars(module))
    with pytest.raises(PatchError, match=rf"toy\.losses\.rank: .*{complaint}"):
        plan(tried(trial), module)
    report = applied(module, tried(trial), strict=False, importers=[module_of("toy.run")])
    assert [(e.action, e.unknown) for e in report.entries] == [
        ("left alone", True),
        ("replaced", False),
    ]
    assert dict(vars(module)) == before
    undo(report.changes)


def asks_for_a_gpu(original: Any, replacement: Any) -> str:
    raise BackendError("UME_BACKEND")


@pytest.mark.parametrize("trial", [lambda old, new: None, asks_for_a_gpu])
def test_a_trial_without_complaint(trial) -> None:
    assert len(plan(tried(trial), module_of("toy.losses"))[0]) == 2


def test_a_trial_leaves_no_trace_and_knows_no_defaults() -> None:
    seen: list[Any] = []

    def trial(original: Any, replacement: Any) -> None:
        x = torch.nn.Linear(2, 2)(torch.randn(1, 2))
        seen.extend((x.device.type, x.requires_grad, torch.is_autocast_enabled("cpu")))

    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        plan(tried(trial), module_of("toy.losses"))
    assert seen == ["cpu", False, False]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wanted", "got", "complaint"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-5], dtype=torch.float64), None),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), "(difference 1.0e-01)"),
        (torch.tensor(torch.nan), torch.tensor(1.0), "(difference nan)"),
        (torch.zeros(2), torch.zeros(3), "the shape [2], expected [3]"),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.tensor(1.0), 1.0, "a Tensor, expected a float"),
        ((1.0, None), (1.0, None), None),
        ((1.0, None), (1.0, 3), "a NoneType, expected a int"),
        ((1.0,), (1.0, 2.0), "1 values, expected 2"),
        ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}, None),
        ({"a": 1.0}, {"b": 1.0}, "(a), expected (b)"),
        ("mean", "sum", "'mean', expected 'sum'"),
    ],
)
def test_differences_in_words(wanted, got, complaint) -> None:
    found = difference(wanted, got)
    assert found is None if complaint is None else complaint in str(found)


def test_an_optional_target_may_be_absent() -> None:
    recipe = Recipe("toy", ("m",), (), (Target("newer", ("self",), doubling, "x", required=False),))
    assert plan(recipe, module_of("m")) == ([], [])


def test_nothing_is_set_when_one_attribute_cannot_be() -> None:
    module = module_of("toy.losses")
    before = dict(vars(module))
    entry = Entry("int.real", "replaced")
    changes = [Change(module, "rank", print, entry), Change(int, "real", 1, entry)]
    with pytest.raises(PatchError, match=r"int\.real: cannot be replaced"):
        commit(changes)
    assert dict(vars(module)) == before


def test_reverting_what_somebody_replaced_since_changes_nothing() -> None:
    module = module_of("toy.losses")
    report = applied(module)
    module.rank = print
    loss = vars(module.Loss)["__call__"]
    with pytest.raises(PatchError, match=r"builtins\.print stands there now"):
        undo(report.changes)
    assert vars(module.Loss)["__call__"] is loss


def test_the_report_tells_everything() -> None:
    report = applied(module_of("toy.losses"))
    text = str(report)
    assert "2 replaced, 1 left alone" in text
    for entry in report.entries:
        assert entry.target in text
    loaded = json.loads(report.to_json())
    assert loaded["recipe"] == "toy"
    assert [e["action"] for e in loaded["entries"]] == ["replaced", "replaced", "left alone"]


class Doubled(InstanceForward):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.original(x) * 2


def test_an_instance_forward_is_copied_with_its_module() -> None:
    module = nn.Linear(2, 3)
    model = nn.Sequential(module)
    commit([Change(module, "forward", Doubled(module), Entry("0", "replaced"))])
    x = torch.randn(4, 2)
    expected = nn.functional.linear(x, module.weight, module.bias) * 2
    assert torch.equal(model(x), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].forward.module is twin[0]
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin[0].weight.zero_()
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
