"""Ragged collectives between ranks, of what gloo and NCCL both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

if dist.is_available():
    # The functions of this module have the default group as a default argument, bound when it is
    # imported. torch imports it with its compiler, at the first call of any custom operation: by
    # then there is a group, and it would outlive destroy_process_group together with its threads.
    # A gloo thread that drops the last reference to a tensor while Python shuts down aborts the
    # process ("terminate called without an active exception").
    import torch.distributed.nn.functional

Tensor = torch.Tensor


def _all_gather(found: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
    # torch 2.13 renamed the collective.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(found, mine, group=group, async_op=async_op)


@dataclass(frozen=True)
class Layout:
    """Who holds which of the M global rows: rank r has ``sizes[r]`` of them, in rank order."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """First global row of this rank."""
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        return self.start + self.sizes[self.rank]

    def span(self, rank: int) -> tuple[int, int]:
        """``[start, stop)`` of a rank's rows."""
        start = sum(self.sizes[:rank])
        return start, start + self.sizes[rank]


def gather_header(values: Sequence[int], group: Any, device: torch.device) -> list[list[int]]:
    """The same few integers of every rank; waits for them."""
    mine = torch.tensor([values], dtype=torch.int64, device=device)
    found = mine.new_empty(dist.get_world_size(group), len(values))
    _all_gather(found, mine, group=group)
    return [[int(v) for v in row] for row in found.tolist()]


class Gathering:
    """The rows of every rank, on their way: ``[n_r, …]`` here, ``[M, …]`` after `wait`."""

    def __init__(self, mine: Tensor, sizes: Sequence[int], group: Any) -> None:
        self._sizes, self._longest = sizes, max(sizes)
        self._sent = mine.contiguous()
        if mine.shape[0] < self._longest:  # collectives want equal shapes
            self._sent = mine.new_zeros(self._longest, *mine.shape[1:])
            self._sent[: mine.shape[0]] = mine
        self._found = mine.new_empty(len(sizes) * self._longest, *mine.shape[1:])
        self._work = _all_gather(self._found, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        if min(self._sizes) == self._longest:
            return self._found
        blocks = self._found.split(self._longest)
        return torch.cat([block[:size] for block, size in zip(blocks, self._sizes, strict=True)])


def gather(mine: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """The rows ``[M, …]`` of every rank."""
    return Gathering(mine, sizes, group).wait()


class Reduction:
    """The sum over ranks of what each has for this rank's rows, on its way.

    In rank order and in the accumulation dtype of `out`: the same bits on every run.
    """

    def __init__(self, contributions: Tensor, layout: Layout) -> None:
        self._layout = layout
        self._sent = contributions.contiguous()
        mine = layout.sizes[layout.rank]
        self._found = contributions.new_empty(layout.world * mine, *contributions.shape[1:])
        self._work = dist.all_to_all_single(
            self._found,
            self._sent,
            [mine] * layout.world,
            list(layout.sizes),
            group=layout.group,
            async_op=True,
        )

    def wait(self, dtype: torch.dtype) -> Tensor:
        self._work.wait()
        first, *others = self._found.view(
            self._layout.world, self._layout.sizes[self._layout.rank], *self._found.shape[1:]
        )
        total = first.to(dtype)
        for other in others:
            total = total + other
        return total


class Passing:
    """A tensor on its way to the next rank while the previous one's arrives."""

    def __init__(
        self, held: Tensor, incoming_shape: Sequence[int], layout: Layout, tag: int
    ) -> None:
        self._sent = held.contiguous()
        self._found = held.new_empty(*incoming_shape)
        to = self._global((layout.rank + 1) % layout.world, layout.group)
        source = self._global((layout.rank - 1) % layout.world, layout.group)
        operations = []
        if self._sent.numel():
            operations.append(dist.P2POp(dist.isend, self._sent, to, layout.group, tag))
        if self._found.numel():
            operations.append(dist.P2POp(dist.irecv, self._found, source, layout.group, tag))
        self._work = dist.batch_isend_irecv(operations) if operations else []

    @staticmethod
    def _global(rank: int, group: Any) -> int:
        return rank if group is None else int(dist.get_global_rank(group, rank))

    def wait(self) -> Tensor:
        for work in self._work:
            work.wait()
        return self._found
