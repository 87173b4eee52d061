"""A differentiable Qwen2-VL with the PLUME adapter, for training small models.

Parameters and vision tower are the backbone's; what is written here is the text side with
autograd, which the engine's in-place KV arena does not have. Batches are *uniform*: every row
has its visual block at the same place with the same grid, so that one position index serves all
rows, and rows are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels import DecoderLayerWeights, MoETransition
from ume_kernels.decode.reference import mlp, project_qkv
from ume_kernels.prefill.reference import apply_rope, rms_norm_reference
from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.mrope import mrope_cos_sin
from ume_models.backbone.text import TextModel
from ume_models.backbone.vision import VisionModel

LayerCache = tuple[torch.Tensor, torch.Tensor]
CosSin = tuple[torch.Tensor, torch.Tensor]


def _attend(
    query: torch.Tensor, cache: LayerCache, mask: torch.Tensor | None, layer: DecoderLayerWeights
) -> torch.Tensor:
    """Rotated ``query [B, H, q, d]`` on ``cache``, projected to ``[B, q, D]``.

    ``mask`` broadcasts to ``[B, 1, q, S]``. The query heads of a key head become further rows
    of it: no copies of keys and values.
    """
    groups = query.shape[1] // cache[0].shape[1]
    folded = query.unflatten(1, (-1, groups)).flatten(2, 3)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[2], -1)
        mask = torch.cat([mask] * groups, dim=-2)
    out = F.scaled_dot_product_attention(folded, *cache, attn_mask=mask)
    out = out.unflatten(2, (groups, -1)).flatten(1, 2)
    return F.linear(out.transpose(1, 2).flatten(2), layer.o_weight)


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
        self.model = TextModel(config)
        self.visual = VisionModel(config.vision)
        self.latent_moe_transition = MoETransition(config.hidden_size)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of ``ids``."""
        return self.model.embed_tokens(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (tied embeddings)."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def visual_tokens(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """``[N, t·h·w, patch values]`` with one ``grid`` to ``[N, t·h·w/merge², D]``."""
        tokens = self.visual(patches.flatten(0, 1), [grid] * len(patches))
        return tokens.unflatten(0, (len(patches), -1))

    def _rope(self, positions: torch.Tensor) -> CosSin:
        # [3, …] positions; tables [..., d]
        section = self.config.mrope_section
        return mrope_cos_sin(positions, self.model.inv_freq(), section, torch.float32)

    def _qkv(
        self, x: torch.Tensor, layer: DecoderLayerWeights, rope: CosSin
    ) -> tuple[torch.Tensor, LayerCache]:
        """Rotated queries ``[B, H, S, d]``, and rotated keys with values."""
        shape = self.model.shape
        normed = rms_norm_reference(x, layer.input_norm, shape.rms_eps)
        query, key, value = (t.transpose(1, 2) for t in project_qkv(normed, layer, shape))
        return apply_rope(query, *rope), (apply_rope(key, *rope), value)

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
        columns = torch.arange(total)
        causal, causal_head = columns <= columns[h:, None], columns[:h] <= columns[:h, None]
        tap_mask = columns <= taps[:, None, :, None]
        rows = torch.arange(batch)[:, None]
        cache: list[LayerCache] = []
        layers = self.model.layer_weights()
        shape = self.model.shape
        x, head = inputs, header
        for i, layer in enumerate(layers):
            query, own = self._qkv(x, layer, own_rope)
            head_query, shared = self._qkv(head, layer, head_rope)
            keys, values = (
                torch.cat([a.expand(batch, -1, -1, -1), b], dim=2)
                for a, b in zip(shared, own, strict=True)
            )
            cache.append((keys, values))
            if i < len(layers) - 1:
                x = mlp(x + _attend(query, cache[-1], causal, layer), layer, shape)
                head = mlp(head + _attend(head_query, shared, causal_head, layer), layer, shape)
            else:
                tapped = query.transpose(1, 2)[rows, taps - h].transpose(1, 2)
                x = x[rows, taps - h] + _attend(tapped, cache[-1], tap_mask, layer)
                x = mlp(x, layer, shape)
        padded = bool((lengths < total).any())
        return Prefill(self.model.final_norm(x), cache, lengths, padded)

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
        for i, layer in enumerate(self.model.layer_weights()):
            query, new = self._qkv(x, layer, rope)
            keys, values = (
                torch.cat([a, b], dim=2) for a, b in zip(state.cache[i], new, strict=True)
            )
            state.cache[i] = (keys, values)
            x = mlp(x + _attend(query, state.cache[i], mask, layer), layer, self.model.shape)
        return self.model.final_norm(x)
