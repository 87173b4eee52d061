"""Preallocated ragged KV arena."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ume_models.backbone.config import BackboneConfig

# Capacities are rounded up so that batches of similar length reuse one allocation.
CAPACITY_STEP = 64


class KVArena:
    """Keys and values of a batch: ``[layers, k/v, slot, kv_head, capacity, head_dim]``.

    One allocation serves batch after batch and grows when a batch needs more; it never
    shrinks by itself (``release`` frees it). Row r of a batch lives in slot r; its length is
    kept in a device tensor.
    """

    def __init__(self, config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = config.num_layers
        self._kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._dtype = dtype
        self._device = device
        self._storage: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment."""
        return 0 if self._storage is None else self._storage.nbytes

    def bytes_for(self, rows: int, length: int) -> int:
        """Bytes that ``rows`` rows of ``length`` tokens need."""
        per_token = 2 * self._layers * self._kv_heads * self._head_dim * self._dtype.itemsize
        return rows * _round_up(length) * per_token

    def begin(self, lengths: Sequence[int], extra: int) -> torch.Tensor:
        """A cache for rows of ``lengths`` prompt tokens that will grow by ``extra`` tokens.

        Everything a masked read may touch beyond a row's own tokens is zeroed: a masked weight
        of 0 times a stale NaN would still be NaN.

        Returns:
            ``[layers, 2, rows, Hkv, capacity, dh]``, valid until the next ``begin``.
        """
        rows, capacity = len(lengths), _round_up(max(lengths) + extra)
        shape = (self._layers, 2, rows, self._kv_heads, capacity, self._head_dim)
        size = torch.Size(shape).numel()
        if self._storage is None or self._storage.numel() < size:
            self._storage = None  # free before allocating the larger one
            self._storage = torch.empty(size, dtype=self._dtype, device=self._device)
        cache = self._storage[:size].view(shape)
        for row, length in enumerate(lengths):
            cache[:, :, row, :, length:].zero_()
        return cache

    def release(self) -> None:
        """Free the allocation."""
        self._storage = None


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
