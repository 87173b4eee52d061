"""ume_kernels.dispatch: choice, insistence, reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

import ume_kernels  # the operations register themselves
from ume_kernels import dispatch
from ume_kernels.dispatch import Backend, BackendError, Obstacle, OpReport

ONE = torch.zeros(1)
TWO = torch.zeros(2)


def single_only(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    if not tensors:
        return Obstacle("no such chip", missing="a chip", remedy="buy one")
    assert tensors[0] is not None
    return None if tensors[0].numel() == 1 else Obstacle("more than one element")


def slow(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
    return Obstacle("slower than torch", soft=True)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("UME_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_OPERATIONS", dict(dispatch._OPERATIONS))
    dispatch._parse.cache_clear()
    dispatch.register(
        "toy",
        {Backend.NATIVE: single_only, Backend.TRITON: slow, Backend.TORCH: dispatch.always},
    )
    yield
    dispatch._parse.cache_clear()


def test_takes_the_first_that_can() -> None:
    assert dispatch.select("toy", ONE) is Backend.NATIVE
    assert dispatch.select("toy", TWO) is Backend.TORCH


@pytest.mark.parametrize(
    "value", ["torch", "TORCH", " torch ", "toy:torch", "decode:torch, toy:torch"]
)
def test_environment_is_binding(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("UME_BACKEND", value)
    assert dispatch.select("toy", ONE) is Backend.TORCH


def test_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_BACKEND", "torch")
    assert dispatch.select("toy", ONE) is Backend.TORCH
    monkeypatch.setenv("UME_BACKEND", "")
    assert dispatch.select("toy", ONE) is Backend.NATIVE


def test_argument_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_BACKEND", "torch")
    assert dispatch.select("toy", ONE, backend="native") is Backend.NATIVE
    assert dispatch.select("toy", ONE, backend=Backend.NATIVE) is Backend.NATIVE


def test_single_operation_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_BACKEND", "decode:torch")
    assert dispatch.select("toy", ONE) is Backend.NATIVE


def test_soft_obstacle_yields_to_insistence() -> None:
    assert dispatch.select("toy", TWO, backend="triton") is Backend.TRITON


def test_hard_obstacle_raises() -> None:
    with pytest.raises(BackendError, match="'native' of operation 'toy' cannot run: more than one"):
        dispatch.select("toy", TWO, backend="native")


@pytest.mark.parametrize("value", ["tpu", "toy:tpu"])
def test_unknown_backend_lists_the_valid_ones(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("UME_BACKEND", value)
    with pytest.raises(BackendError, match="'tpu'; valid ones are torch, "):
        dispatch.select("toy", ONE)


def test_unknown_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="unknown operation 'convolution'"):
        dispatch.select("convolution", ONE)
    monkeypatch.setenv("UME_BACKEND", "convolution:torch")
    with pytest.raises(BackendError, match=r"unknown operation 'convolution'.*toy"):
        dispatch.select("toy", ONE)


def test_backend_an_operation_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="'toy' has no backend 'cuda'; it has native"):
        dispatch.select("toy", ONE, backend="cuda")
    monkeypatch.setenv("UME_BACKEND", "toy:cuda")
    with pytest.raises(BackendError, match="'toy' has no backend 'cuda'; it has native"):
        dispatch.explain("toy")


def test_a_backend_for_all_is_for_those_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.register("plain", {Backend.TORCH: dispatch.always})
    monkeypatch.setenv("UME_BACKEND", "native")
    assert dispatch.select("toy", ONE) is Backend.NATIVE
    assert dispatch.select("plain", ONE) is Backend.TORCH
    with pytest.raises(BackendError, match="'native' of operation 'toy' cannot run"):
        dispatch.select("toy", TWO)
    monkeypatch.setattr(dispatch, "_OPERATIONS", {"plain": {Backend.TORCH: dispatch.always}})
    with pytest.raises(BackendError, match="no operation has that backend"):
        dispatch.select("plain", ONE)


@pytest.mark.parametrize("value", ["toy:", "torch,toy:torch", "toy:torch,decode"])
def test_a_malformed_list_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("UME_BACKEND", value)
    with pytest.raises(BackendError, match="is not OPERATION:BACKEND"):
        dispatch.select("toy", ONE)


def test_too_few_operands_of_explain_are_named() -> None:
    with pytest.raises(BackendError, match="'decode'"):
        dispatch.explain("decode", ONE)


@pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError, ValueError])
def test_a_bug_in_a_check_looks_like_one(error: type[Exception]) -> None:
    def broken(tensors: Sequence[torch.Tensor | None]) -> Obstacle | None:
        raise error("ours")

    dispatch.register("toy", {Backend.NATIVE: broken, Backend.TORCH: dispatch.always})
    for ask in (dispatch.explain, dispatch.select):
        with pytest.raises(error, match="ours") as caught:
            ask("toy", ONE)
        assert caught.type is error


def test_no_backend_left() -> None:
    dispatch.register("toy", {Backend.NATIVE: single_only})
    with pytest.raises(BackendError, match="no backend"):
        dispatch.select("toy", TWO)
    with pytest.raises(ValueError, match="at least one"):
        dispatch.register("toy", {})


def test_explain_names_what_is_missing() -> None:
    report = {r.op: r for r in dispatch.explain()}["toy"]
    assert report == OpReport(
        "toy",
        Backend.TORCH,
        "no native: no such chip; no triton: slower than torch",
        missing="a chip",
        remedy="buy one",
    )


def test_explain_covers_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {r.op: r for r in dispatch.explain()}
    assert set(reports) == set(dispatch.operations())
    assert {"moe_transition", "decode", "linear", "similarity_topk"} <= set(reports)
    monkeypatch.setenv("UME_BACKEND", "torch")
    assert {(r.backend, r.reason) for r in dispatch.explain()} == {
        (Backend.TORCH, "UME_BACKEND asks for it")
    }


def test_explain_one_operation_for_given_tensors() -> None:
    assert dispatch.explain("toy", ONE) == OpReport("toy", Backend.NATIVE, "the fastest backend")
    assert dispatch.explain("toy", TWO) == OpReport(
        "toy", Backend.TORCH, "no native: more than one element; no triton: slower than torch"
    )
    # without tensors: the machine, as in the list
    assert dispatch.explain("toy") in dispatch.explain()


def test_explain_tells_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_BACKEND", "toy:triton")
    assert dispatch.explain("toy", ONE) == OpReport(
        "toy", Backend.TRITON, "UME_BACKEND asks for it"
    )
    assert dispatch.explain("toy", ONE, backend="torch") == OpReport(
        "toy", Backend.TORCH, "the caller asks for it"
    )


def test_explain_agrees_with_select() -> None:
    for tensors in ((), (ONE,), (TWO,)):
        assert dispatch.explain("toy", *tensors).backend is dispatch.select("toy", *tensors)
    with pytest.raises(BackendError, match="'native' of operation 'toy' cannot run: more than one"):
        dispatch.explain("toy", TWO, backend="native")
    with pytest.raises(BackendError, match="unknown operation 'convolution'"):
        dispatch.explain("convolution")


def test_explain_a_real_operation() -> None:
    x, weight = torch.zeros(2, 8).half(), torch.zeros(4, 8).half()
    report = ume_kernels.explain("linear", x, weight, None)
    assert report.backend is Backend.TORCH
    assert report.reason.startswith("no native: ")
