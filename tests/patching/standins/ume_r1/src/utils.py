"""Printing, and moving batches."""

from __future__ import annotations

from typing import Any

import torch


def print_rank(message: object) -> None:
    print(message, flush=True)


def print_master(message: object) -> None:
    print(message, flush=True)


def batch_to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
