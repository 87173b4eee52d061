"""A compact, differentiable Qwen2-VL with the PLUME adapter, for training small models.

It computes what transformers' ``Qwen2VLForConditionalGeneration`` computes (tested), under the
older checkpoint's parameter names, without depending on a transformers version. Batches are
*uniform*: every row has its visual block at the same place with the same grid, so that one
position index serves all rows, and rows are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels import MoETransition
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.mrope import mrope_cos_sin

LayerCache = tuple[torch.Tensor, torch.Tensor]
CosSin = tuple[torch.Tensor, torch.Tensor]


def _rotate(x: torch.Tensor, rope: CosSin) -> torch.Tensor:
    """Rotary embedding of ``x [B, H, S, d]`` by tables broadcastable to ``[B, 1, S, d]``."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


class _RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    """Grouped-query attention; ``forward`` is split so that callers choose the queries."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.groups = config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(width, config.num_heads * self.head_dim)
        self.k_proj = nn.Linear(width, config.num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(width, config.num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, width, bias=False)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x: torch.Tensor, rope: CosSin) -> LayerCache:
        return _rotate(self._heads(self.k_proj(x)), rope), self._heads(self.v_proj(x))

    def attend(
        self, x: torch.Tensor, rope: CosSin, cache: LayerCache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of ``x [B, q, D]`` on ``cache``; ``mask`` broadcasts to ``[B, 1, q, S]``."""
        query = _rotate(self._heads(self.q_proj(x)), rope)
        # The query heads of a key head become further rows of it: no copies of keys and values.
        folded = query.unflatten(1, (-1, self.groups)).flatten(2, 3)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], x.shape[1], -1)
            mask = torch.cat([mask] * self.groups, dim=-2)
        out = F.scaled_dot_product_attention(folded, *cache, attn_mask=mask)
        out = out.unflatten(2, (self.groups, -1)).flatten(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _DecoderLayer(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = _RmsNorm(config.hidden_size, config.rms_eps)
        self.post_attention_layernorm = _RmsNorm(config.hidden_size, config.rms_eps)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class _VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rope: CosSin) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(_rotate(query, rope), _rotate(key, rope), value)
        return self.proj(out.transpose(1, 2).flatten(2))


class _VisionMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # quick GELU


class _VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _VisionAttention(width, heads)
        self.mlp = _VisionMlp(width, inner)

    def forward(self, x: torch.Tensor, rope: CosSin) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class _Merger(nn.Module):
    def __init__(self, width: int, merge: int, out: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        inner = width * merge**2
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, out))
        self.merge = merge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The patches of a merged token follow each other in the processor's order.
        return self.mlp(self.ln_q(x).unflatten(-2, (-1, self.merge**2)).flatten(-2))


class _PatchEmbed(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        v = config.vision
        kernel = (v.temporal_patch_size, v.patch_size, v.patch_size)
        self.proj = nn.Conv3d(v.in_channels, v.embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # Kernel equals stride: the convolution is one matrix product.
        return F.linear(patches, self.proj.weight.flatten(1))


class VisionTower(nn.Module):
    """Patches of uniform pictures to merged visual tokens."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        v = config.vision
        self.head_dim, self.merge = v.embed_dim // v.num_heads, v.merge_size
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(
            [_VisionBlock(v.embed_dim, v.num_heads, v.intermediate_size) for _ in range(v.depth)]
        )
        self.merger = _Merger(v.embed_dim, v.merge_size, v.out_dim)

    def _rope(self, height: int, width: int) -> CosSin:
        m = self.merge
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        axes = [
            axis.reshape(height // m, m, width // m, m).transpose(1, 2).reshape(-1)
            for axis in (rows, cols)
        ]
        dim = self.head_dim // 2
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
        half = torch.cat([axis[:, None].float() * inv_freq for axis in axes], dim=-1)
        full = torch.cat([half, half], dim=-1)
        return full.cos(), full.sin()

    def forward(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """``[N, t·h·w, patch values]`` with one ``grid`` to ``[N, t·h·w/merge², D]``."""
        t, h, w = grid
        x = self.patch_embed(patches).unflatten(1, (t, h * w)).flatten(0, 1)
        rope = self._rope(h, w)
        for block in self.blocks:
            x = block(x, rope)
        return self.merger(x).unflatten(0, (-1, t)).flatten(1, 2)


@dataclass
class Prefill:
    """State after the prefix.

    Attributes:
        taps: ``[B, n, D]`` final hidden states at the requested positions.
        cache: keys and values per layer, ``[B, kv_heads, S, d]``, right-padded.
        lengths: ``[B]`` real lengths.
        padded: whether any row is shorter than S.
    """

    taps: torch.Tensor
    cache: list[LayerCache]
    lengths: torch.Tensor
    padded: bool


class PlumeNetwork(nn.Module):
    """Backbone and adapter; ``state_dict()`` has the keys of an official checkpoint."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList([_DecoderLayer(config) for _ in range(config.num_layers)]),
                "norm": _RmsNorm(config.hidden_size, config.rms_eps),
            }
        )
        self.visual = VisionTower(config)
        self.latent_moe_transition = MoETransition(config.hidden_size)
        dim = config.head_dim
        self._inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2).float() / dim)

    @property
    def _layers(self) -> list[Any]:
        return list(cast(nn.ModuleList, self.model["layers"]))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of ``ids``."""
        return self.model["embed_tokens"](ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (tied embeddings)."""
        return F.linear(hidden, self.model["embed_tokens"].weight)  # type: ignore[arg-type]

    def _rope(self, positions: torch.Tensor) -> CosSin:
        # [3, …] positions; tables [..., d]
        section = self.config.mrope_section
        return mrope_cos_sin(positions, self._inv_freq, section, torch.float32)

    def prefill(
        self,
        header: torch.Tensor,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        taps: torch.Tensor,
    ) -> Prefill:
        """Run the prefix.

        Args:
            header: ``[1, H, D]`` embeddings every row begins with; computed once.
            inputs: ``[B, S - H, D]`` embeddings of the rest, right-padded.
            positions: int64 ``[3, S]``, shared by all rows.
            lengths: int64 ``[B]``, header included.
            taps: int64 ``[B, n]`` positions (at least H) whose final hidden state is wanted;
                the last layer computes only those.
        """
        batch, h = len(inputs), header.shape[1]
        total = h + inputs.shape[1]
        cos, sin = self._rope(positions)
        head_rope, own_rope = (cos[:h], sin[:h]), (cos[h:], sin[h:])
        tap_rope: CosSin = (cos[taps][:, None], sin[taps][:, None])
        columns = torch.arange(total)
        causal, causal_head = columns <= columns[h:, None], columns[:h] <= columns[:h, None]
        tap_mask = columns <= taps[:, None, :, None]
        rows = torch.arange(batch)[:, None]
        cache: list[LayerCache] = []
        layers = self._layers
        x, head = inputs, header
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            normed, head_normed = layer.input_layernorm(x), layer.input_layernorm(head)
            own = attention.keys_values(normed, own_rope)
            shared = attention.keys_values(head_normed, head_rope)
            keys, values = (
                torch.cat([a.expand(batch, -1, -1, -1), b], dim=2)
                for a, b in zip(shared, own, strict=True)
            )
            cache.append((keys, values))
            if i < len(layers) - 1:
                x = layer.finish(x, attention.attend(normed, own_rope, cache[-1], causal))
                attended = attention.attend(head_normed, head_rope, shared, causal_head)
                head = layer.finish(head, attended)
            else:
                attended = attention.attend(normed[rows, taps - h], tap_rope, cache[-1], tap_mask)
                x = layer.finish(x[rows, taps - h], attended)
        padded = bool((lengths < total).any())
        return Prefill(self.model["norm"](x), cache, lengths, padded)

    def extend(self, inputs: torch.Tensor, state: Prefill, generated: int) -> torch.Tensor:
        """Append ``inputs [B, q, D]`` to the cache; returns their final hidden states.

        Positions are the rows' own lengths plus ``generated`` (the steps before), equal on the
        three axes. ``state.cache`` grows.
        """
        batch, q, _ = inputs.shape
        prefix = state.cache[0][0].shape[2] - generated
        where = state.lengths[:, None] + generated + torch.arange(q)
        cos, sin = self._rope(where.expand(3, -1, -1))
        rope: CosSin = (cos[:, None], sin[:, None])
        mask = None
        if state.padded or q > 1:
            seen = torch.arange(prefix) < state.lengths[:, None]
            old = seen.new_ones(batch, generated)
            base = torch.cat([seen, old], dim=1)[:, None].expand(-1, q, -1)
            own = torch.ones(q, q, dtype=torch.bool).tril().expand(batch, -1, -1)
            mask = torch.cat([base, own], dim=2)[:, None]
        x = inputs
        for i, layer in enumerate(self._layers):
            h = layer.input_layernorm(x)
            new = layer.self_attn.keys_values(h, rope)
            keys, values = (
                torch.cat([a, b], dim=2) for a, b in zip(state.cache[i], new, strict=True)
            )
            state.cache[i] = (keys, values)
            x = layer.finish(x, layer.self_attn.attend(h, rope, state.cache[i], mask))
        return self.model["norm"](x)
