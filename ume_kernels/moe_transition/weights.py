"""The adapter's parameters as one argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SharedExpert:
    """The always-on expert: ``fc2(gelu(fc1(u)))`` with fc1 ``[2D, D]`` and fc2 ``[D, 2D]``."""

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


@dataclass(frozen=True)
class MoEWeights:
    """Parameters of the latent transition.

    Expert parameters are indexed by expert: a stacked tensor ``[E, …]`` (inference) and a
    sequence of ``E`` tensors (training, where each keeps its own gradient) both serve.

    Shapes: ``ln_*`` [D]; ``step_embed`` [S, D]; ``router_weight`` [E, 2D]; ``router_bias`` [E];
    ``fc1_weight`` E × [2D, D]; ``fc1_bias`` E × [2D]; ``fc2_weight`` E × [D, 2D];
    ``fc2_bias`` E × [D].
    """

    ln_weight: torch.Tensor
    ln_bias: torch.Tensor
    step_embed: torch.Tensor
    router_weight: torch.Tensor
    router_bias: torch.Tensor
    fc1_weight: torch.Tensor | Sequence[torch.Tensor]
    fc1_bias: torch.Tensor | Sequence[torch.Tensor]
    fc2_weight: torch.Tensor | Sequence[torch.Tensor]
    fc2_bias: torch.Tensor | Sequence[torch.Tensor]
    shared: SharedExpert | None
    ln_eps: float = 1e-5

    @property
    def num_experts(self) -> int:
        """Number of routed experts, E."""
        return int(self.router_weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the latent state, D."""
        return int(self.ln_weight.shape[0])

    def stacked(self) -> MoEWeights:
        """The same with expert parameters as tensors ``[E, …]``.

        A view where they lie at equal distances in one storage (``MoETransition.pack_experts``)
        and no gradient is wanted, else ``torch.stack``, which is differentiable.
        """
        return replace(
            self,
            fc1_weight=stack_experts(self.fc1_weight),
            fc1_bias=stack_experts(self.fc1_bias),
            fc2_weight=stack_experts(self.fc2_weight),
            fc2_bias=stack_experts(self.fc2_bias),
        )


def stack_experts(parts: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``[E, …]`` contiguous from ``E`` tensors: a view where possible, else a copy."""
    if isinstance(parts, torch.Tensor):
        return parts.contiguous()
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return torch.stack(list(parts))
    view = packed_view(parts)
    return torch.stack(list(parts)) if view is None else view


def packed_view(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``parts`` as one tensor without a copy, None unless they follow each other in memory."""
    first = parts[0]
    if torch.compiler.is_compiling() or type(first.data) is not torch.Tensor or first.is_meta:
        return None
    size = first.numel()
    storage = first.untyped_storage().data_ptr()
    start = first.storage_offset()
    for number, part in enumerate(parts):
        if (
            part.shape != first.shape
            or part.dtype != first.dtype
            or not part.is_contiguous()
            or part.untyped_storage().data_ptr() != storage
            or part.storage_offset() != start + number * size
        ):
            return None
    stride = (size, *first.stride())
    return first.detach().as_strided((len(parts), *first.shape), stride, start)
