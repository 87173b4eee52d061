"""The rollout as ``torch.compile`` makes it fast: static key/value buffers, captured steps.

This is the recipe of gpt-fast: buffers of fixed size written by index, one compiled step replayed
K - 1 times, one compiled chunk for the last latent and the suffix. ``mode="reduce-overhead"`` fuses
what it can and captures each of the two into a CUDA graph. Prompts of different lengths in one
batch are padded on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.rivals.packed_adapter import PackedAdapter
from ume_kernels import MoETransition
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.text import TextModel
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.rollout.latent import LatentPlan

MODE = "reduce-overhead"


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class StaticCacheRollout(nn.Module):
    """K latent steps and the suffix on static buffers, weights shared with the model.

    Args:
        config: architecture.
        text: the decoder.
        adapter: the latent transition.
        suffix_ids: forced tokens after the latents.
        steps: K ≥ 0.
        rows: batch size B.
        capacity: tokens per row of the buffers.
        compiled: False runs the same code eagerly.
    """

    def __init__(
        self,
        config: BackboneConfig,
        text: TextModel,
        adapter: MoETransition,
        suffix_ids: tuple[int, ...],
        steps: int,
        rows: int,
        capacity: int,
        compiled: bool = True,
    ) -> None:
        super().__init__()
        # As modules and buffers their addresses are static, so that graphs do not copy them.
        self.text, self.adapter = text, PackedAdapter(adapter)
        self.steps, self.config = steps, config
        weight = text.embed_tokens.weight
        size = (config.num_layers, 2, rows, config.num_kv_heads, capacity, config.head_dim)
        self.register_buffer("cache", weight.new_zeros(size), persistent=False)
        self.register_buffer("inv_freq", text.inv_freq(), persistent=False)
        suffix = torch.tensor(suffix_ids, device=weight.device)
        embedded = F.embedding(suffix, weight).detach().expand(rows, -1, -1).contiguous()
        self.register_buffer("suffix", embedded, persistent=False)
        pads = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.register_buffer("pads", pads, persistent=False)
        options: dict[str, Any] = {"mode": MODE, "fullgraph": True, "dynamic": False}
        self._step = torch.compile(self.step, **options) if compiled else self.step
        self._last = torch.compile(self.last, **options) if compiled else self.last

    @classmethod
    def of(
        cls, model: PlumeForEmbedding, plan: LatentPlan, rows: int, prefix: int
    ) -> StaticCacheRollout:
        """For a model's rows of ``prefix`` tokens; compiled on a GPU."""
        assert model.latent_moe_transition is not None
        capacity = -(-(prefix + plan.steps + len(plan.suffix_ids)) // 8) * 8
        return cls(
            model.config, model.model, model.latent_moe_transition, plan.suffix_ids, plan.steps,
            rows, capacity, compiled=model.device.type == "cuda",
        )  # fmt: skip

    def load(self, cache: torch.Tensor, pads: torch.Tensor | None = None) -> None:
        """Take over the prefill's keys and values ``[layers, 2, B, Hkv, C', dh]``, C' ≤ C.

        ``pads`` int64 ``[B]``: how many of the C' tokens of each row are padding on the left.
        """
        self.cache.zero_()
        self.pads.zero_() if pads is None else self.pads.copy_(pads)
        self.cache[:, :, :, :, : cache.shape[4]].copy_(cache)

    def decode(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """``Q`` new tokens per row ``[B, Q, D]`` in slots from int64 ``position`` ``[1]`` on."""
        c = self.config
        rows, queries, _ = hidden.shape
        group = c.num_heads // c.num_kv_heads
        at = position + torch.arange(queries, device=hidden.device)
        angles = (at - self.pads[:, None])[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos = angles.cos().to(hidden.dtype)[:, :, None]
        sin = angles.sin().to(hidden.dtype)[:, :, None]
        slots = torch.arange(self.cache.shape[4], device=hidden.device)
        seen = (slots <= at[:, None]) & (slots >= self.pads[:, None, None])
        mask = seen[:, None].expand(-1, group, -1, -1).reshape(rows, 1, group * queries, -1)
        for number, layer in enumerate(self.text.layers):
            w = layer.self_attn
            n = _norm(hidden, layer.input_layernorm.weight, c.rms_eps)
            q = _rotate(w.q_proj(n).view(rows, queries, c.num_heads, c.head_dim), cos, sin)
            k = _rotate(w.k_proj(n).view(rows, queries, c.num_kv_heads, c.head_dim), cos, sin)
            v = w.v_proj(n).view(rows, queries, c.num_kv_heads, c.head_dim)
            keys, values = self.cache[number, 0], self.cache[number, 1]
            keys.index_copy_(2, at, k.transpose(1, 2))
            values.index_copy_(2, at, v.transpose(1, 2))
            # The query heads of a KV head go along the query axis: the cache is read once.
            packed = q.view(rows, queries, c.num_kv_heads, group, c.head_dim)
            packed = packed.permute(0, 2, 3, 1, 4).reshape(rows, c.num_kv_heads, -1, c.head_dim)
            mixed = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
            mixed = mixed.view(rows, c.num_kv_heads, group, queries, c.head_dim)
            hidden = hidden + w.o_proj(mixed.permute(0, 3, 1, 2, 4).reshape(rows, queries, -1))
            m = _norm(hidden, layer.post_attention_layernorm.weight, c.rms_eps)
            gated = F.silu(layer.mlp.gate_proj(m)) * layer.mlp.up_proj(m)
            hidden = hidden + layer.mlp.down_proj(gated)
        return _norm(hidden, self.text.norm.weight, c.rms_eps)

    def step(
        self,
        z: torch.Tensor,
        context: torch.Tensor,
        number: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """One latent step: ``[B, D]`` to ``[B, D]``."""
        return self.decode(self.adapter(z, context, number)[:, None], position)[:, 0]

    def last(
        self,
        z: torch.Tensor,
        context: torch.Tensor,
        number: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """The last latent, if any, and the suffix as one chunk; the state at the last token."""
        if not self.steps:
            return self.decode(self.suffix, position)[:, -1]
        latent = self.adapter(z, context, number)[:, None]
        return self.decode(torch.cat([latent, self.suffix], dim=1), position)[:, -1]

    @torch.no_grad()
    def forward(self, z: torch.Tensor, context: torch.Tensor, length: int) -> torch.Tensor:
        """Roll out rows whose prompts take ``length`` slots each, padding included; ``[B, D]``."""
        device = z.device
        numbers = torch.arange(max(self.steps, 1), device=device)[:, None]
        positions = length + numbers
        for k in range(self.steps - 1):
            # Cloned, since the next replay of the same graph overwrites its own output.
            z = self._step(z, context, numbers[k], positions[k]).clone()
        return self._last(z, context, numbers[-1], positions[-1])
