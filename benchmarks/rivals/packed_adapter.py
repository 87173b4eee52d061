"""The adapter without host reads, as one writes it for ``torch.compile`` and CUDA graphs.

One row gathers the experts it chose; several rows run all experts in one batched product and pick
their results. Same parameters and same output as ``MoETransition``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels import MoETransition


class PackedAdapter(nn.Module):
    """Experts stacked once; everything else is the module's.

    Args:
        adapter: whose parameters to use; only the stacked experts are copied where they are not
            in one storage.
    """

    def __init__(self, adapter: MoETransition) -> None:
        super().__init__()
        self.adapter = adapter
        experts = adapter.weights()
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
            value = getattr(experts, name)
            if not isinstance(value, torch.Tensor):
                value = torch.stack(list(value)).detach()
            self.register_buffer(name, value, persistent=False)

    def forward(self, z: torch.Tensor, context: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """``z [B, D]``, ``context [B, D]`` and ``step`` int64 ``[1]`` to ``z' [B, D]``."""
        a = self.adapter
        embedded = a.step_embed.weight[step].expand(z.shape[0], -1)
        logits = a.router(torch.cat([z + context, embedded], dim=-1))
        top, chosen = logits.float().softmax(-1).topk(a.top_k, dim=-1)
        u = F.layer_norm(z, (z.shape[-1],), a.ln.weight, a.ln.bias, a.ln.eps)
        if z.shape[0] == 1:
            hidden = torch.einsum("kod,d->ko", self.fc1_weight[chosen[0]], u[0])
            hidden = F.gelu(hidden + self.fc1_bias[chosen[0]])
            every = torch.einsum("kdo,ko->kd", self.fc2_weight[chosen[0]], hidden)
            every = (every + self.fc2_bias[chosen[0]])[None]
        else:
            hidden = torch.baddbmm(
                self.fc1_bias[:, None], u.expand(a.num_experts, -1, -1), self.fc1_weight.mT
            )
            out = torch.baddbmm(self.fc2_bias[:, None], F.gelu(hidden), self.fc2_weight.mT)
            index = chosen[..., None].expand(-1, -1, z.shape[-1])
            every = out.transpose(0, 1).gather(1, index)
        mix = (top.to(z.dtype)[..., None] * every).sum(1)
        if a.shared_expert is not None:
            s = a.shared_expert
            mix = mix + s.fc2(F.gelu(s.fc1(u)))
        return z + mix
