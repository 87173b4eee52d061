"""Sharded and replicated training steps in two gloo processes, against the unpatched model."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def ddp(model: Any) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(model: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kind = type(model.model.language_model.layers[0])
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({kind}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def fsdp2(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def one_step(model: nn.Module, rank: int) -> torch.Tensor:
    """Hidden states after one step of gradient descent, which differ if any gradient did."""
    ids = torch.arange(3 + rank, 20 + rank)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def worker(rank: int, folder: str, plain: Any) -> None:
    from ume_models.patching import apply

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for wrap in (ddp, fsdp1, fsdp2):
            expected = one_step(wrap(copy.deepcopy(plain)), rank)
            for first in ("patch", "wrap"):
                model = copy.deepcopy(plain)
                if first == "patch":
                    assert apply(model).replaced
                model = wrap(model)
                if first == "wrap":
                    report = apply(model)
                    assert any("layers.*.mlp (2)" in e.target for e in report.replaced)
                found = one_step(model, rank)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()
    gc.collect()


def test_two_processes(build: Any, tmp_path: Path) -> None:
    plain = build()
    with torch.no_grad():
        before = plain(input_ids=torch.arange(3, 20)[None]).logits
    after = one_step(copy.deepcopy(plain), 0)
    assert float((after - before).abs().max()) > 1e-2
    mp.spawn(worker, args=(str(tmp_path), plain), nprocs=2)
