"""Definition of ``linear``: PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x weightᵀ + bias; x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` → ``[..., N]``."""
    return F.linear(x, weight, bias)
