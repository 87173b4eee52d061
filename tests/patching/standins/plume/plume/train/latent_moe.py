"""Stand-in for the official training adapter: its names and its loop over ranks and experts."""

import torch
import torch.nn.functional as F
from torch import nn


class ExpertMLP(nn.Module):
    def __init__(self, hidden_size, dropout_prob=0.0):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * int(hidden_size))
        self.fc2 = nn.Linear(2 * int(hidden_size), hidden_size)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(max(float(dropout_prob), 0.0))

    def forward(self, x):
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class LatentMoETransition(nn.Module):
    def __init__(
        self,
        hidden_size,
        num_experts,
        top_k,
        use_shared_expert=True,
        step_embed_max_steps=32,
        expert_dropout=0.0,
    ):
        super().__init__()
        self.hidden_size = int(hidden_size)
        self.num_experts = max(int(num_experts), 1)
        self.top_k = min(max(int(top_k), 1), self.num_experts)
        self.use_shared_expert = bool(use_shared_expert)
        self.step_embed_max_steps = max(int(step_embed_max_steps), 1)
        self.expert_dropout = max(float(expert_dropout), 0.0)
        self.ln = nn.LayerNorm(self.hidden_size)
        self.step_embed = nn.Embedding(self.step_embed_max_steps, self.hidden_size)
        self.router = nn.Linear(2 * self.hidden_size, self.num_experts)
        self.experts = nn.ModuleList(
            ExpertMLP(self.hidden_size, self.expert_dropout) for _ in range(self.num_experts)
        )
        self.shared_expert = (
            ExpertMLP(self.hidden_size, self.expert_dropout) if self.use_shared_expert else None
        )

    def _build_step_ids(self, batch_size, step_id, device):
        if torch.is_tensor(step_id):
            ids = step_id.to(device=device, dtype=torch.long).view(-1)
            if ids.numel() == 1 and batch_size > 1:
                ids = ids.expand(batch_size)
            if ids.numel() != batch_size:
                raise ValueError(f"step_id shape mismatch: {batch_size} rows, {tuple(ids.shape)}")
        else:
            ids = torch.full((batch_size,), int(step_id), dtype=torch.long, device=device)
        return ids.clamp(0, self.step_embed_max_steps - 1)

    def _normalize_context(self, z_t, context):
        if context is None:
            return torch.zeros_like(z_t)
        context = context.to(device=z_t.device, dtype=z_t.dtype)
        if context.ndim == 1:
            context = context.unsqueeze(0)
        if context.shape[0] == 1 and z_t.shape[0] > 1:
            context = context.expand(z_t.shape[0], -1)
        if context.shape != z_t.shape:
            raise ValueError(f"context shape mismatch: {tuple(z_t.shape)}, {tuple(context.shape)}")
        return context

    def _mask_logits(self, logits):
        return logits

    def forward(self, z_t, step_id, context=None):
        if z_t.ndim != 2:
            raise ValueError(f"z_t must be [B, D], got {tuple(z_t.shape)}")
        if z_t.shape[1] != self.hidden_size:
            raise ValueError(f"hidden size mismatch: {self.hidden_size}, got {z_t.shape[1]}")
        embedded = self.step_embed(self._build_step_ids(len(z_t), step_id, z_t.device))
        gate_in = z_t + self._normalize_context(z_t, context)
        logits = self.router(torch.cat([gate_in, embedded.to(z_t.dtype)], dim=-1))
        probs = F.softmax(self._mask_logits(logits), dim=-1)
        top_prob, top_index = probs.topk(self.top_k, dim=-1)
        u = self.ln(z_t).to(z_t.dtype)
        mixed = torch.zeros_like(u) if self.shared_expert is None else self.shared_expert(u)
        routed = torch.zeros_like(u)
        for rank in range(self.top_k):
            out = torch.zeros_like(u)
            for number, expert in enumerate(self.experts):
                rows = top_index[:, rank] == number
                if rows.any():
                    out[rows] = expert(u[rows]).to(out.dtype)
            routed = routed + top_prob[:, rank, None].to(u.dtype) * out
        z_out = z_t + (mixed + routed).to(z_t.dtype)
        mean = probs.mean(dim=0)
        balance = ((mean - torch.full_like(mean, 1.0 / self.num_experts)) ** 2).mean()
        entropy = -(probs * probs.clamp_min(1e-8).log()).sum(dim=-1).mean()
        return z_out, {"balance_loss": balance, "router_entropy": entropy}
