"""Models inside of torch.compile, PEFT, DDP and FSDP, wrapped before and after patching."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ume_models.patching import apply, revert
from ume_models.patching.changes import InstanceForward
from ume_models.patching.unwrap import unwrap

pytestmark = pytest.mark.compat

ids = torch.arange(3, 20)[None]
ORDERS = pytest.mark.parametrize("first", ["patch", "wrap"])


def patched(model):
    return [m for m in model.modules() for v in vars(m).values() if isinstance(v, InstanceForward)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def wrapped(model, wrap, first):
    """The wrapped and patched model, and the report."""
    if first == "patch":
        report = apply(model)
        return wrap(model), report
    model = wrap(model)
    return model, apply(model)


# -- torch.compile -----------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_in_one_graph(build, text_of, dtype, first):
    """The graph is that of the original: nothing of ours breaks it or hides in it."""
    model = text_of(build(dtype=dtype))
    graphs: list[Any] = []

    def backend(graph, examples):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op.startswith("call")])
        return graph.forward

    def wrap(module):
        return torch.compile(module, backend=backend, fullgraph=True)

    given = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        expected = wrap(copy.deepcopy(model))(**given).last_hidden_state
        torch._dynamo.reset()
        both, _ = wrapped(model, wrap, first)
        found = both(**given).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert patched(model)
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


@ORDERS
def test_compiled_training_step(build, first):
    model = build().train()
    reference = copy.deepcopy(model)
    both, _ = wrapped(model, lambda m: torch.compile(m, backend="eager"), first)
    both(input_ids=ids).logits.square().mean().backward()
    reference(input_ids=ids).logits.square().mean().backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_patched_and_reverted_after_it_was_compiled(build):
    """Compiled code must notice that a forward was set or taken off."""
    model = build()
    compiled = torch.compile(model, backend="eager")
    expected = logits(compiled)
    report = apply(compiled, logits=False)
    assert logits(compiled).shape[-1] == 0
    revert(report)
    torch.testing.assert_close(logits(compiled), expected)


# -- PEFT --------------------------------------------------------------------------------------


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "gate_proj", "down_proj", "qkv"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config).eval()


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(build, inputs, dtype, first):
    expected_model = lora(build(dtype=dtype))
    both, report = wrapped(build(dtype=dtype), lora, first)
    both.load_state_dict(expected_model.state_dict())
    assert report.replaced
    assert len(patched(both)) >= len(report.changes)
    # bf16 is rounded after every product, and those of few rows are summed in another order
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0, "atol": 0.05}
    )
    with torch.no_grad():
        expected = expected_model(**inputs).logits
        torch.testing.assert_close(both(**inputs).logits, expected, **tolerance)
        assert not any(
            isinstance(vars(m).get("forward"), InstanceForward)
            for name, m in both.named_modules()
            if "lora_" in name
        )
        merged = both.merge_and_unload()
        expected = expected_model.merge_and_unload()(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, **tolerance)
    if first == "wrap":
        revert(report)
    revert(merged)
    assert not patched(merged)


def test_lora_gradients(build, inputs):
    expected, both = lora(build()).train(), lora(build()).train()
    both.load_state_dict(expected.state_dict())
    apply(both)
    for model in (expected, both):
        model(**inputs).logits.square().mean().backward()
    compared = 0
    for mine, theirs in zip(both.parameters(), expected.parameters(), strict=True):
        if theirs.grad is not None:
            compared += 1
            rounding = 2e-5 * float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=rounding)
    assert compared > 10


def test_names_in_the_report_are_the_models_own(build):
    report = apply(lora(build(dtype=torch.bfloat16)))
    targets = [e.target for e in report.entries]
    assert not any("base_layer" in t or "base_model" in t for t in targets)
    assert any(t.endswith("layers.*.mlp (2)") for t in targets)


# -- several processes' wrappers, in one -------------------------------------------------------


@ORDERS
@pytest.mark.usefixtures("world")
def test_distributed_data_parallel(build, first):
    from torch.nn.parallel import DistributedDataParallel

    model = build().train()
    reference = copy.deepcopy(model)
    both, report = wrapped(
        model, lambda m: DistributedDataParallel(m, find_unused_parameters=True), first
    )
    assert unwrap(both) is model
    assert report.subject == type(model).__name__
    both(input_ids=ids).logits.square().mean().backward()
    reference(input_ids=ids).logits.square().mean().backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    revert(both)
    assert not patched(both)


@ORDERS
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("original", [True, False], ids=["orig_params", "flat_params"])
def test_fully_sharded_1(build, text_of, original, first):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def wrap(model):
        policy = ModuleWrapPolicy({type(text_of(model).layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
        )

    model = build()
    expected = logits(copy.deepcopy(model))
    both, report = wrapped(model, wrap, first)
    assert any("layers.*.mlp (2)" in e.target for e in report.replaced)
    assert not any("_fsdp" in e.target for e in report.entries)
    torch.testing.assert_close(logits(both), expected)
    both.train()(input_ids=ids).logits.square().mean().backward()
    revert(both)
    torch.testing.assert_close(logits(both), expected)


@ORDERS
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fully_sharded_2(build, text_of, dtype, first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))

    def wrap(model):
        for layer in text_of(model).layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = build(dtype=dtype)
    expected = logits(copy.deepcopy(model))
    both, report = wrapped(model, wrap, first)
    assert any("layers.*.mlp (2)" in e.target for e in report.replaced)
    torch.testing.assert_close(logits(both), expected)
    both.train()(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in both.named_parameters() if "language_model" in n)
    revert(both)
    torch.testing.assert_close(logits(both), expected)


def test_activation_checkpoint_wrapper(build, text_of):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    model = build()
    kind = type(text_of(model).layers[0])
    expected = logits(model)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kind))
    report = apply(model)
    assert any(e.target.endswith("layers.*.mlp (2)") for e in report.replaced)
    torch.testing.assert_close(logits(model), expected)


def test_wrapped_more_than_once(build):
    model = build()
    for outer in (torch.compile(lora(model), backend="eager"), lora(build())):
        assert isinstance(unwrap(outer), nn.Module)
        assert type(unwrap(outer)).__name__ == "Qwen2VLForConditionalGeneration"
