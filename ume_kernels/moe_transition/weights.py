"""The adapter's parameters as one argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
