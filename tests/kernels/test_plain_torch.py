"""``backend="torch"`` is PyTorch and nothing else: with all kernels replaced, everything runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ume_kernels import (
    DecoderLayerWeights,
    LayerShape,
    MoETransition,
    attend_cache,
    contrastive_loss,
    decode_layer,
    decode_step,
    distributed_contrastive_loss,
    linear,
    moe_transition,
    native,
    rope_table,
    similarity_topk,
)
from ume_kernels.contrastive_loss import contrastive_loss_reference
from ume_kernels.decode import attend_cache_reference, decode_layer_reference
from ume_kernels.dispatch import operations
from ume_kernels.moe_transition import moe_transition_reference
from ume_kernels.prefill import reference as prefill
from ume_kernels.prefill import rms_norm, rope_append, silu_mul, silu_mul_
from ume_kernels.similarity_topk import similarity_topk_reference
from ume_kernels.triton_backend import interpreting


class OursRan(Exception):
    """A kernel of this package was called."""


def refuse(*args: object, **kwargs: object) -> None:
    raise OursRan


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the native module, and every launch of a Triton kernel, raises."""
    for name, value in vars(native.module).items() if native.module else ():
        if callable(value):
            monkeypatch.setattr(native.module, name, refuse)
    if importlib.util.find_spec("triton"):
        from triton.runtime.jit import KernelInterface

        monkeypatch.setattr(KernelInterface, "__getitem__", refuse)


def draw(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, requires_grad=grad)


def run_linear(run: Callable[..., Any], **options: Any) -> None:
    run(draw(2, 16), draw(8, 16), draw(8), **options)


def run_moe(run: Callable[..., Any], grad: bool, **options: Any) -> None:
    module = MoETransition(32).requires_grad_(grad)
    z, _ = run(draw(2, 32), draw(2, 32), 1, module.weights(), 2, **options)
    if grad:
        z.sum().backward()


def run_decode(run: Callable[..., Any], **options: Any) -> None:
    shape = LayerShape(4, 2, 16, 1e-6)
    weights = DecoderLayerWeights(
        draw(32), draw(64, 32), draw(64), draw(32, 32), draw(32), draw(32, 32), draw(32),
        draw(32, 64), draw(32), draw(48, 32), draw(48, 32), draw(32, 48),
    )  # fmt: skip
    step = decode_step(torch.tensor([3, 5]), 1, 6, rope_table(8, draw(8)), shape, torch.float32)
    run(draw(2, 1, 32), step, draw(2, 2, 8, 16), draw(2, 2, 8, 16), weights, shape, **options)


def run_attend(run: Callable[..., Any], **options: Any) -> None:
    slots, lengths = torch.tensor([1, 0]), torch.tensor([3, 5])
    run(draw(2, 1, 4, 16), draw(2, 2, 8, 16), draw(2, 2, 8, 16), slots, lengths, **options)


def run_norm(run: Callable[..., Any], **options: Any) -> None:
    run(draw(2, 16), draw(16), 1e-6, **options)


def run_rope(run: Callable[..., Any], **options: Any) -> None:
    at = torch.arange(2)
    q, k, v = draw(2, 4, 16), draw(2, 2, 16), draw(2, 2, 16)
    arena = draw(2, 2, 8, 16), draw(2, 2, 8, 16)
    run(q, k, v, draw(2, 8), draw(2, 8), *arena, at, at, **options)


def run_gate(run: Callable[..., Any], **options: Any) -> None:
    run(draw(2, 16), draw(2, 16), **options)


def run_loss(run: Callable[..., Any], **options: Any) -> None:
    q, p, extra = draw(4, 16, grad=True), draw(4, 16, grad=True), draw(3, 16)
    ignore = (torch.tensor([[0, 1]]), 0.1)
    valid = torch.tensor([True, True, True, False])
    run(q, p, extra_negatives=extra, ignore=ignore, valid=valid, **options).backward()


def run_topk(run: Callable[..., Any], stored: bool, **options: Any) -> None:
    c = draw(300, 16)
    corpus = c.numpy() if stored else c
    segments = [[0, 5, 7], np.array([1, 2])]
    run(draw(2, 16), corpus, 3, normalize=True, allowed=torch.ones(300).bool(), **options)
    run(draw(2, 16), corpus, 3, segments=segments, **options)


CALLS: dict[str, tuple[str, Callable[..., None]]] = {
    "linear": ("linear", partial(run_linear, linear)),
    "moe_transition": ("moe_transition", partial(run_moe, moe_transition, False)),
    "moe_transition, training": ("moe_transition", partial(run_moe, moe_transition, True)),
    "decode_layer": ("decode", partial(run_decode, decode_layer)),
    "attend_cache": ("decode", partial(run_attend, attend_cache)),
    "rms_norm": ("rms_norm", partial(run_norm, rms_norm)),
    "rope_append": ("rope_append", partial(run_rope, rope_append)),
    "silu_mul": ("silu_mul", partial(run_gate, silu_mul)),
    "silu_mul_": ("silu_mul", partial(run_gate, silu_mul_)),
    "contrastive_loss": ("contrastive_loss", partial(run_loss, contrastive_loss)),
    "alone": ("contrastive_loss", partial(run_loss, distributed_contrastive_loss)),
    "similarity_topk": ("similarity_topk", partial(run_topk, similarity_topk, False)),
    "of an array": ("similarity_topk", partial(run_topk, similarity_topk, True, block=256)),
}
NATIVE = ("linear", "moe_transition", "decode_layer", "contrastive_loss", "similarity_topk")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("insist", ["argument", "for all", "for one", "compiled"])
def test_torch_is_plain(name: str, insist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, call = CALLS[name]
    monkeypatch.delenv("UME_BACKEND", raising=False)
    if insist == "argument":
        call(backend="torch")
    elif insist == "compiled":
        torch.compile(call, backend="eager")(backend="torch")
    else:
        monkeypatch.setenv("UME_BACKEND", "torch" if insist == "for all" else f"{op}:torch")
        call()


def test_every_operation_is_among_the_calls() -> None:
    assert {op for op, _ in CALLS.values()} == set(operations())


@pytest.mark.parametrize(
    "call",
    [
        partial(run_moe, moe_transition_reference, False),
        partial(run_moe, moe_transition_reference, True),
        partial(run_decode, decode_layer_reference),
        partial(run_attend, attend_cache_reference),
        partial(run_norm, prefill.rms_norm_reference),
        partial(run_rope, prefill.rope_append_reference),
        partial(run_gate, prefill.silu_mul_reference),
        partial(run_gate, prefill.silu_mul_reference_),
        partial(run_loss, contrastive_loss_reference),
        partial(similarity_topk_reference, torch.ones(2, 16), torch.ones(9, 16), 3),
    ],
)
def test_references_are_plain(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UME_BACKEND", raising=False)
    call()


@pytest.mark.skipif(native.cpu_isa() in (None, "scalar"), reason="no native kernels run here")
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_kernel_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UME_BACKEND", raising=False)
    with pytest.raises(OursRan):
        CALLS[name][1]()


@pytest.mark.skipif(not interpreting(), reason="Triton is not there, or does not interpret")
@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("linear", "of an array")])
def test_a_triton_kernel_would_be_noticed(name: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(OursRan):
        CALLS[name][1](backend="triton")
