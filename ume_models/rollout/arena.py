"""Preallocated ragged KV arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.rollout.buckets import batch_bucket, capacity_bucket

# Capacities are rounded up so that batches of similar length reuse one allocation.
CAPACITY_STEP = 64


class KVArena:
    """Keys and values of a batch: ``[layers, k/v, slot, kv_head, capacity, head_dim]``.

    One allocation serves batch after batch and grows when a batch needs more; it never
    shrinks by itself (``release`` frees it). Row r of a batch lives in slot r; its length is
    kept in a device tensor.

    Args:
        config, dtype, device: of the text model.
        bucketed: hand out the shape of the batch's bucket (rows and capacity), so that graphs
            captured over it serve other batches of the bucket. The default is what CUDA needs.
        moved: called before the allocation is freed, with nothing of it in use any more.
    """

    def __init__(
        self,
        config: BackboneConfig,
        dtype: torch.dtype,
        device: torch.device,
        bucketed: bool | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        self._layers = config.num_layers
        self._kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._dtype = dtype
        self._device = device
        self._bucketed = device.type == "cuda" if bucketed is None else bucketed
        self._moved = moved
        self._storage: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment."""
        return 0 if self._storage is None else self._storage.nbytes

    @property
    def address(self) -> int:
        """Where the allocation begins; 0 when there is none."""
        return 0 if self._storage is None else self._storage.data_ptr()

    def bytes_for(self, rows: int, length: int) -> int:
        """Bytes that ``rows`` rows of ``length`` tokens need."""
        return torch.Size(self._shape(rows, length)).numel() * self._dtype.itemsize

    def begin(self, lengths: Sequence[int], extra: int, finite: bool = True) -> torch.Tensor:
        """A cache for rows of ``lengths`` prompt tokens that will grow by ``extra`` tokens.

        With ``finite``, everything a masked read may touch beyond a row's own tokens is zeroed:
        a masked weight of 0 times a stale NaN would still be NaN. Kernels that read nothing
        beyond a row's length do not need it.

        Returns:
            ``[layers, 2, rows, Hkv, capacity, dh]``, valid until the next ``begin``.
        """
        shape = self._shape(len(lengths), max(lengths) + extra)
        size = torch.Size(shape).numel()
        if self._storage is None or self._storage.numel() < size:
            self.release()  # before allocating the larger one
            # Zeros where nothing clears later: what stays behind a row is then always a value.
            make = torch.empty if finite else torch.zeros
            self._storage = make(size, dtype=self._dtype, device=self._device)
        cache = self._storage[:size].view(shape)
        if finite:
            for row, length in enumerate(lengths):
                cache[:, :, row, :, length:].zero_()
            cache[:, :, len(lengths) :].zero_()
        return cache

    def grow(self, cache: torch.Tensor, length: int) -> torch.Tensor:
        """The cache of the current batch with room for rows of ``length`` tokens."""
        shape = self._shape(cache.shape[2], length)
        storage = torch.zeros(torch.Size(shape).numel(), dtype=self._dtype, device=self._device)
        larger = storage.view(shape)
        larger[..., : cache.shape[4], :] = cache
        self.release()
        self._storage = storage
        return larger

    def release(self) -> None:
        """Free the allocation."""
        if self._storage is None:
            return
        if self._moved is not None:
            self._moved()
        if self._storage.is_cuda:
            # Freed for the stream that allocated it, which need not be the one that used it last.
            self._storage.record_stream(torch.cuda.current_stream(self._device))
        self._storage = None

    def _shape(self, rows: int, length: int) -> tuple[int, ...]:
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        if self._bucketed:
            rows, capacity = batch_bucket(rows), capacity_bucket(length)
        return (self._layers, 2, rows, self._kv_heads, capacity, self._head_dim)
