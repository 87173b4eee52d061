"""Stand-in for the evaluation's adapter: its names, and its loop over ranks and experts."""

import torch
import torch.nn.functional as F
from torch import nn


class ExpertMLP(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * int(hidden_size))
        self.fc2 = nn.Linear(2 * int(hidden_size), hidden_size)
        self.act = nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LatentMoETransition(nn.Module):
    def __init__(
        self,
        hidden_size,
        num_experts,
        top_k,
        use_shared_expert=True,
        step_embed_max_steps=32,
        excluded_expert_indices=None,
    ):
        super().__init__()
        self.hidden_size = int(hidden_size)
        self.num_experts = max(int(num_experts), 1)
        self.top_k = min(max(int(top_k), 1), self.num_experts)
        self.use_shared_expert = bool(use_shared_expert)
        self.step_embed_max_steps = max(int(step_embed_max_steps), 1)
        mask = torch.zeros(self.num_experts, dtype=torch.bool)
        for index in excluded_expert_indices or ():
            mask[int(index)] = True
        if self.num_experts - int(mask.sum()) < self.top_k:
            raise ValueError(f"too few experts remain for top_k={self.top_k}")
        self.register_buffer("_router_exclude_mask", mask, persistent=False)
        self.ln = nn.LayerNorm(self.hidden_size)
        self.step_embed = nn.Embedding(self.step_embed_max_steps, self.hidden_size)
        self.router = nn.Linear(2 * self.hidden_size, self.num_experts)
        self.experts = nn.ModuleList(ExpertMLP(self.hidden_size) for _ in range(self.num_experts))
        self.shared_expert = ExpertMLP(self.hidden_size) if self.use_shared_expert else None

    def _build_step_ids(self, batch_size, step_id, device):
        if torch.is_tensor(step_id):
            step_ids = step_id.to(device=device, dtype=torch.long).view(-1).expand(batch_size)
        else:
            step_ids = torch.full((batch_size,), int(step_id), dtype=torch.long, device=device)
        return step_ids.clamp(0, self.step_embed_max_steps - 1)

    def _normalize_context(self, z_t, context):
        if context is None:
            return torch.zeros_like(z_t)
        context = context.to(device=z_t.device, dtype=z_t.dtype)
        return (context.unsqueeze(0) if context.ndim == 1 else context).expand_as(z_t)

    def forward(self, z_t, step_id, context=None):
        if z_t.ndim != 2:
            raise ValueError(f"z_t must be [B, D], got {tuple(z_t.shape)}")
        step_ids = self._build_step_ids(z_t.shape[0], step_id, z_t.device)
        gate_in = z_t + self._normalize_context(z_t, context)
        logits = self.router(torch.cat([gate_in, self.step_embed(step_ids).to(z_t.dtype)], dim=-1))
        if bool(self._router_exclude_mask.any()):
            logits = logits.masked_fill(self._router_exclude_mask.to(logits.device), float("-inf"))
        probs = F.softmax(logits, dim=-1)
        top_probs, top_experts = torch.topk(probs, k=self.top_k, dim=-1)
        u = self.ln(z_t).to(z_t.dtype)
        mixed = self.shared_expert(u) if self.shared_expert is not None else torch.zeros_like(u)
        routed = torch.zeros_like(u)
        for rank in range(self.top_k):
            out = torch.zeros_like(u)
            for number, expert in enumerate(self.experts):
                rows = top_experts[:, rank] == number
                if rows.any():
                    out[rows] = expert(u[rows]).to(out.dtype)
            routed = routed + top_probs[:, rank].unsqueeze(-1).to(u.dtype) * out
        z_out = z_t + (mixed + routed).to(z_t.dtype)
        mean = probs.mean(dim=0)
        balance_loss = ((mean - 1.0 / self.num_experts) ** 2).mean()
        entropy = -(probs * probs.clamp_min(1e-8).log()).sum(dim=-1).mean()
        return z_out, {"balance_loss": balance_loss, "router_entropy": entropy}
