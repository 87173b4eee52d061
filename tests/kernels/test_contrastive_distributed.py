"""distributed_contrastive_loss in two and three gloo processes, against one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from ume_kernels import native
from ume_kernels.contrastive_loss import (
    contrastive_loss,
    contrastive_loss_reference,
    distributed_contrastive_loss,
)

Tensor = torch.Tensor

OPS = Path(__file__).parents[1] / "conformance" / "plume_tiny" / "ops.safetensors"

SIZES = {2: (5, 3), 3: (4, 0, 6)}
"""Ragged, with an empty rank among three."""


def relative(got: Tensor, expected: Tensor) -> float:
    size = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    return difference / size if size else difference


def worker(rank: int, world: int, folder: str, jobs: list[Callable[..., None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    default_group = weakref.ref(dist.group.WORLD)
    try:
        for job in jobs:
            job(rank, world)
    finally:
        dist.destroy_process_group()
    # Its threads would still run when Python shuts down, and then and now abort the process.
    gc.collect()
    assert default_group() is None, "something keeps the process group alive"


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks(world: int, tmp_path: Path) -> None:
    # Starting processes costs seconds: everything runs in the same ones.
    jobs = [
        ragged_sizes_equal_one_process,
        masks_groups_and_lists_equal_one_process,
        gathered_gives_the_same_bits_twice,
        extra_negatives_stay_local,
        nothing_counts_on_a_rank,
        an_empty_list_is_no_list,
        bad_input_raises_everywhere,
        inside_a_subgroup,
        torch_runs_no_kernel_of_ours,
    ]
    if world == 2:
        jobs = [recorded_official_cases, *jobs]
    mp.spawn(worker, (world, str(tmp_path), jobs), world)


def run(q: Tensor, p: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of this rank's rows, and of the scale."""
    scale = torch.tensor(options.pop("scale", 50.0), dtype=q.dtype, requires_grad=True)
    q, p = (x.detach().clone().requires_grad_() for x in (q, p))
    loss = distributed_contrastive_loss(q, p, scale=scale, **options)
    loss.sum().backward()
    assert q.grad is not None
    assert p.grad is not None
    assert scale.grad is not None
    return loss.detach(), q.grad, p.grad, scale.grad


def recorded_official_cases(rank: int, world: int) -> None:
    ops = load_file(OPS)
    for case, local_loss in (("nce_dist0", True), ("nce_dist1", False)):
        q, p, valid = (ops[f"{case}.{name}"] for name in ("q", "p", "valid"))
        expected = ops[f"{case}.loss_per_rank"][rank]
        rows = slice(rank * len(q) // 2, (rank + 1) * len(q) // 2)
        for ring in (False, True) if local_loss else (False,):
            loss, dq, dp, _ = run(
                q[rows], p[rows], valid=valid[rows], local_loss=local_loss, ring=ring
            )
            assert relative(loss, expected) <= 1e-5
            assert relative(dq, ops[f"{case}.dq"][rows]) <= 1e-5
            assert relative(dp, ops[f"{case}.dp"][rows]) <= 1e-5


def inputs(world: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(world)
    total = sum(SIZES[world])
    q, p = (torch.randn(total, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), p.to(dtype)


def rows_of(rank: int, world: int) -> slice:
    start = sum(SIZES[world][:rank])
    return slice(start, start + SIZES[world][rank])


def one_process(world: int, q: Tensor, p: Tensor, **options: Any) -> list[tuple[Tensor, ...]]:
    """Per rank: its loss, the gradients of the sum of all ranks' losses, that of its scale.

    By the definition: the rank's queries against all targets, and its targets against all
    queries, each in one direction.
    """
    ignore, margin = options.pop("ignore", (None, None))
    valid = options.pop("valid", (None, None))
    groups = options.pop("groups", (None, None))
    bidirectional = options.pop("bidirectional", True)
    value = options.pop("scale", 50.0)
    q, p = (x.clone().requires_grad_() for x in (q, p))
    losses, scales = [], []
    for rank in range(world):
        rows = rows_of(rank, world)
        scale = torch.tensor(value, dtype=q.dtype, requires_grad=True)
        scales.append(scale)
        if rows.start == rows.stop:
            losses.append((q.sum() + p.sum()) * 0)
            continue
        parts = []
        for side in range(2 if bidirectional else 1):
            own, others = (q, p) if side == 0 else (p, q)
            listed = ignore
            if ignore is not None:
                listed = ignore if side == 0 else ignore.flip(1)
                inside = (listed[:, 0] >= rows.start) & (listed[:, 0] < rows.stop)
                listed = listed[inside] - torch.tensor([rows.start, 0])
            mine = {
                "valid": None if valid[0] is None else (valid[side][rows], valid[1 - side]),
                "groups": None if groups[0] is None else (groups[side][rows], groups[1 - side]),
                "ignore": (listed, margin),
            }
            parts.append(
                contrastive_loss_reference(
                    own[rows], others, scale=scale, row_offset=rows.start,
                    bidirectional=False, **mine, **options,
                )
            )  # fmt: skip
        losses.append(sum(parts) / len(parts))
    torch.stack([loss.sum() for loss in losses]).sum().backward()
    return [
        (
            losses[rank].detach(),
            q.grad[rows_of(rank, world)],
            p.grad[rows_of(rank, world)],
            torch.zeros(()) if scales[rank].grad is None else scales[rank].grad,
        )
        for rank in range(world)
    ]


def compare(rank: int, world: int, local: dict[str, Any], **options: Any) -> None:
    q, p = inputs(world)
    rows = rows_of(rank, world)
    expected = one_process(world, q, p, **options)[rank]
    for ring in (False, True):
        found = run(q[rows], p[rows], ring=ring, **{**options, **local})
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-9, atol=1e-10)


def ragged_sizes_equal_one_process(rank: int, world: int) -> None:
    compare(rank, world, {})
    compare(rank, world, {}, bidirectional=False, scale=3.0)
    compare(rank, world, {}, reduction="sum", normalize=False, scale=0.3)
    q, p = inputs(world)
    rows = rows_of(rank, world)
    found = run(q[rows], p[rows], local_loss=False)
    square = [x.clone().requires_grad_() for x in (q, p)]
    loss = contrastive_loss_reference(*square)
    loss.backward()
    torch.testing.assert_close(found[0], loss.detach(), rtol=1e-9, atol=1e-10)
    for got, leaf in zip(found[1:3], square, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(got, world * leaf.grad[rows], rtol=1e-9, atol=1e-10)
    # float32 and bfloat16 take the native kernels where there are any
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        narrow = inputs(world, dtype)
        expected = one_process(world, *(x.double() for x in narrow), scale=5.0)[rank]
        for ring in (False, True):
            found = run(*(x[rows] for x in narrow), ring=ring, scale=5.0)
            assert found[1].dtype == dtype
            for got, wanted in zip(found[:3], expected[:3], strict=True):
                assert relative(got.double(), wanted) <= tolerance


def masks_groups_and_lists_equal_one_process(rank: int, world: int) -> None:
    total, rows = sum(SIZES[world]), rows_of(rank, world)
    generator = torch.Generator().manual_seed(9)
    valid = tuple(torch.rand(total, generator=generator) < 0.7 for _ in range(2))
    groups = torch.arange(total) % 2 * 10**12
    pairs = torch.tensor([[0, 2], [4, 6], [7, 1], [0, 7], [0, 2], [6, 4]])
    inside = (pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)
    listed = pairs[inside] - torch.tensor([rows.start, 0])
    mine = tuple(mask[rows] for mask in valid)
    compare(rank, world, {"valid": mine}, valid=valid, scale=9.0)
    compare(rank, world, {"groups": groups[rows]}, groups=(groups, groups))
    compare(rank, world, {"ignore": listed}, ignore=(pairs, None))
    compare(rank, world, {"ignore": 0.1}, ignore=(None, 0.1))
    compare(
        rank,
        world,
        {"valid": mine, "groups": groups[rows], "ignore": (listed, -0.1)},
        valid=valid,
        groups=(groups, groups),
        ignore=(pairs, -0.1),
        reduction="sum",
    )
    # only one rank has a mask: the others' rows are all valid
    first = tuple(mask | (torch.arange(total) >= SIZES[world][0]) for mask in valid)
    local = None if rank else tuple(mask[rows] for mask in first)
    compare(rank, world, {"valid": local}, valid=first)
    # the whole square
    q, p = inputs(world)
    found = run(q[rows], p[rows], local_loss=False, valid=mine, groups=groups[rows], ignore=listed)
    expected = contrastive_loss_reference(q, p, valid=valid, groups=groups, ignore=pairs)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-10)


def gathered_gives_the_same_bits_twice(rank: int, world: int) -> None:
    q, p = inputs(world, torch.float32)
    rows = rows_of(rank, world)
    for ring in (False, True):
        first, second = (run(q[rows], p[rows], ring=ring) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def extra_negatives_stay_local(rank: int, world: int) -> None:
    q, p = inputs(world)
    rows = rows_of(rank, world)
    generator = torch.Generator().manual_seed(rank)
    extra = torch.randn(rank + 1, 6, generator=generator, dtype=q.dtype)
    for ring in (False, True):
        got = distributed_contrastive_loss(
            q[rows], p[rows], extra_negatives=extra, bidirectional=False, ring=ring
        )
        if rows.stop > rows.start:
            expected = contrastive_loss_reference(
                q[rows], p, row_offset=rows.start, extra_negatives=extra, bidirectional=False
            )
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def nothing_counts_on_a_rank(rank: int, world: int) -> None:
    q, p = inputs(world)
    rows = rows_of(rank, world)
    n = rows.stop - rows.start
    q[0] = torch.nan  # on rank 0, not valid there
    for counts in (1, world):  # ranks from this one on
        valid = torch.full((n,), rank >= counts)
        for options in ({}, {"ring": True}, {"local_loss": False}):
            loss, dq, dp, _ = run(q[rows], p[rows], valid=valid, **options)
            mine_count = rank >= counts or (options == {"local_loss": False} and counts < world)
            if not mine_count:
                assert float(loss) == 0
            assert bool(loss.isfinite() and dq.isfinite().all() and dp.isfinite().all())
            if rank < counts:
                assert not bool(dq.any() or dp.any())


def bad_input_raises_everywhere(rank: int, world: int) -> None:
    q, p = inputs(world)
    rows = rows_of(rank, world)
    q, p = q[rows], p[rows]
    last = world - 1

    def refused(match: str, q: Tensor = q, p: Tensor = p, **options: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            distributed_contrastive_loss(q, p, **options)

    others = f"rank {last}" if rank != last else None
    refused(others or "rows are pairs", p=p[:-1] if rank == last else p)
    refused(others or "positive and finite", scale=-1.0 if rank == last else 1.0)
    refused("normalize differs", normalize=rank == last)
    refused("gradient is required", q=q.clone().requires_grad_(rank == last))
    refused("groups", groups=torch.zeros(len(q), dtype=torch.long) if rank else None)
    refused("ring needs local_loss", ring=True, local_loss=False)
    wrong = torch.tensor([[0, 999]]) if rank == last else None
    refused(others or "is outside", ignore=wrong)
    own = torch.tensor([[1, rows.start + 1]]) if rank == last else None
    refused(others or "is a positive", ignore=own)
    refused(
        others or "this rank's queries", ignore=torch.tensor([[77, 0]]) if others is None else None
    )
    # and the group still works
    assert bool(distributed_contrastive_loss(q, p).isfinite())


def an_empty_list_is_no_list(rank: int, world: int) -> None:
    """Also when only one rank has it: what the ranks exchange must not depend on it."""
    q, p = inputs(world)
    rows = rows_of(rank, world)
    empty = torch.empty(0, 2, dtype=torch.int64) if rank == 0 else None
    found = run(q[rows], p[rows], ignore=empty)
    expected = run(q[rows], p[rows])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def inside_a_subgroup(rank: int, world: int) -> None:
    members = [world - 2, world - 1]
    group = dist.new_group(members)
    if rank not in members:
        return
    q, p = inputs(world)
    # a rank of the group is not a rank of the world here
    halves = [rows_of(r, world) for r in members]
    mine = halves[members.index(rank)]
    start = halves[0].start
    for ring in (False, True):
        got = distributed_contrastive_loss(q[mine], p[mine], group=group, ring=ring)
        if mine.start == mine.stop:
            assert float(got) == 0
            continue
        parts = [
            contrastive_loss_reference(
                a[mine], b[start:], row_offset=mine.start - start, bidirectional=False
            )
            for a, b in ((q, p), (p, q))
        ]
        torch.testing.assert_close(got, sum(parts) / 2, rtol=1e-9, atol=1e-10)


def torch_runs_no_kernel_of_ours(rank: int, world: int) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a native kernel ran")

    q, p = (x[rows_of(rank, world)] for x in inputs(world, torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(native.module).items() if native.module else ():
            if callable(value):
                patch.setattr(native.module, name, refuse)
        for options in ({}, {"ring": True}, {"local_loss": False}):
            run(q, p, backend="torch", **options)
            patch.setenv("UME_BACKEND", "contrastive_loss:torch")
            run(q, p, **options)
            patch.delenv("UME_BACKEND")


@pytest.mark.parametrize("ring", [False, True])
def test_without_a_group_it_is_the_plain_loss(ring: bool) -> None:
    q, p = inputs(2)
    got = distributed_contrastive_loss(q, p, ring=ring)
    assert torch.equal(got, contrastive_loss(q, p))
