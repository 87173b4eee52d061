"""Vision towers of Qwen2-VL and Qwen2.5-VL over packed images, without padding.

All images and video slices of a batch go through one sequence; attention stays inside each
slice (Qwen2.5-VL: inside windows, except in its full-attention blocks). Parameters carry
their published names. The patch embedding is a matrix product: the reference's Conv3d has
stride equal to its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels.prefill import rms_norm
from ume_models.backbone.config import VisionConfig
from ume_models.backbone.packed_attention import attend_packed, to_device, variable_length

Grid = tuple[int, int, int]


class PatchEmbed(nn.Module):
    """Patches ``[P, C·T·p·p]`` to ``[P, E]``; the weight keeps its Conv3d shape."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(
            config.in_channels,
            config.embed_dim,
            kernel_size=(config.temporal_patch_size, p, p),
            stride=(config.temporal_patch_size, p, p),
            bias=False,
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Project every patch."""
        return F.linear(patches, self.proj.weight.flatten(1))


class Norm(nn.Module):
    """LayerNorm (Qwen2-VL) or RMSNorm (Qwen2.5-VL), epsilon 1e-6."""

    def __init__(self, size: int, rms: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = None if rms else nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis with float32 statistics."""
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)
        return rms_norm(x, self.weight, 1e-6)


@dataclass(frozen=True)
class Segments:
    """Parts of a packed sequence that attend within themselves.

    Attributes:
        lengths: patches of each part, in order.
        starts: int32 ``[parts + 1]`` on the device where variable-length attention runs, else None.
    """

    lengths: Sequence[int]
    starts: torch.Tensor | None = None


class VisionAttention(nn.Module):
    """Self-attention inside segments of a packed sequence, 2-D rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """``x`` ``[P, E]``; ``cos``/``sin`` ``[P, 1, dh]`` float32; ``segments`` add up to P."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if segments.starts is not None:
            starts, longest = segments.starts, max(segments.lengths)
            mixed = attend_packed(q, k, v, starts, starts, longest, longest, causal=False)
            return self.proj(mixed.flatten(1))
        out = torch.empty_like(q)
        for at, length, count in _equal_runs(segments.lengths):
            rows = slice(at, at + length * count)
            shape = (count, length, *q.shape[1:])
            out[rows] = (
                F.scaled_dot_product_attention(
                    q[rows].view(shape).transpose(1, 2),
                    k[rows].view(shape).transpose(1, 2),
                    v[rows].reshape(shape).transpose(1, 2),
                )
                .transpose(1, 2)
                .reshape(-1, *q.shape[1:])
            )
        return self.proj(out.flatten(1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x * cos + cat(-x2, x1) * sin`` in float32, half by half instead of through a copy."""
    wide = x.float()
    half = x.shape[-1] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


def _equal_runs(segments: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, length, count) of runs of equally long segments, which share one attention call."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    for length in segments:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
        else:
            runs.append((at, length, 1))
        at += length
    return runs


class VisionMLP(nn.Module):
    """``fc2(act(fc1(x)))`` (Qwen2-VL) or a biased SwiGLU (Qwen2.5-VL)."""

    def __init__(self, config: VisionConfig, gated: bool) -> None:
        super().__init__()
        width, inner = config.embed_dim, config.intermediate_size
        self.act = config.hidden_act
        if gated:
            self.gate_proj = nn.Linear(width, inner)
            self.up_proj = nn.Linear(width, inner)
            self.down_proj = nn.Linear(inner, width)
        else:
            self.fc1 = nn.Linear(width, inner)
            self.fc2 = nn.Linear(inner, width)
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[P, E] -> [P, E]``."""
        if self.gated:
            return self.down_proj(_activate(self.gate_proj(x), self.act) * self.up_proj(x))
        return self.fc2(_activate(self.fc1(x), self.act))


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "quick_gelu":
        gate = 1.702 * x
        if torch.is_grad_enabled():
            return x * torch.sigmoid(gate)
        return gate.sigmoid_().mul_(x)  # fresh memory of this width costs more than the arithmetic
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    raise ValueError(f"vision activation {name!r} is not supported")


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, gated: bool) -> None:
        super().__init__()
        self.norm1 = Norm(config.embed_dim, rms=gated)
        self.norm2 = Norm(config.embed_dim, rms=gated)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config, gated)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """``[P, E] -> [P, E]``."""
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Norm, then every merge² neighbouring patches to one token of the text width."""

    def __init__(self, config: VisionConfig, rms: bool) -> None:
        super().__init__()
        self.merged = config.embed_dim * config.merge_size**2
        self.ln_q = Norm(config.embed_dim, rms)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged, self.merged), nn.GELU(), nn.Linear(self.merged, config.out_dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[P, E] -> [P / merge², D]``."""
        return self.mlp(self.ln_q(x).view(-1, self.merged))


class VisionModel(nn.Module):
    """Patches of any number of images and videos to visual tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        gated = config.window_size is not None
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([VisionBlock(config, gated) for _ in range(config.depth)])
        self.merger = PatchMerger(config, rms=gated)

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Visual tokens of packed patches.

        Args:
            patches: ``[P, C·T·p·p]`` in the processor's order (merge blocks together).
            grids: (t, h, w) in patches of every image or video, in order.

        Returns:
            ``[P / merge², D]`` in the same order.

        Raises:
            ValueError: the grids do not add up to P.
        """
        total = sum(t * h * w for t, h, w in grids)
        if total != patches.shape[0]:
            raise ValueError(f"grids describe {total} patches, but {patches.shape[0]} were given")
        config = self.config
        device = patches.device
        angles = self.rope_angles(grids).to(device, non_blocking=True)
        slices = self._segments([h * w for t, h, w in grids for _ in range(t)], patches)
        x = self.patch_embed(patches)
        order, windows = None, slices
        if config.window_size is not None:
            order, sizes = _window_order(grids, config)
            windows = self._segments(sizes, patches)
            unit = config.merge_size**2
            order = order.to(device, non_blocking=True)
            x = x.view(-1, unit, x.shape[-1])[order].flatten(0, 1)
            angles = angles.view(-1, unit, angles.shape[-1])[order].flatten(0, 1)
        full = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = full.cos(), full.sin()
        for number, block in enumerate(self.blocks):
            windowed = order is not None and number not in config.full_attention_blocks
            x = block(x, cos, sin, windows if windowed else slices)
        x = self.merger(x)
        return x if order is None else x[torch.argsort(order)]

    def patch_coordinates(self, grids: Sequence[Grid]) -> torch.Tensor:
        """Row and column ``[P, 2]`` of each patch, merge blocks together."""
        merge = self.config.merge_size
        parts = []
        for t, h, w in grids:
            rows = torch.arange(h, device="cpu").view(h // merge, 1, merge, 1)
            rows = rows.expand(-1, w // merge, -1, merge)
            columns = torch.arange(w, device="cpu").view(1, w // merge, 1, merge)
            columns = columns.expand(h // merge, -1, merge, -1)
            parts.append(torch.stack([rows.flatten(), columns.flatten()], dim=-1).repeat(t, 1))
        return torch.cat(parts)

    def rope_angles(self, grids: Sequence[Grid]) -> torch.Tensor:
        """Rotary angles ``[P, dh / 2]`` from row and column of each patch."""
        quarter = self.config.embed_dim // self.config.num_heads // 2
        exponent = torch.arange(0, quarter, 2, dtype=torch.float, device="cpu") / quarter
        inv_freq = 1.0 / (10000.0**exponent)
        return (self.patch_coordinates(grids)[..., None].float() * inv_freq).flatten(1)

    def _segments(self, lengths: Sequence[int], patches: torch.Tensor) -> Segments:
        head_dim = self.config.embed_dim // self.config.num_heads
        if not variable_length(patches.device, patches.dtype, head_dim):
            return Segments(lengths)
        starts = to_device([0, *accumulate(lengths)], patches.device, torch.int32)
        return Segments(lengths, starts)


def _window_order(grids: Sequence[Grid], config: VisionConfig) -> tuple[torch.Tensor, list[int]]:
    """Qwen2.5-VL windows: permutation of merged tokens, and patches per non-empty window."""
    assert config.window_size is not None
    side = config.window_size // config.merge_size // config.patch_size
    unit = config.merge_size**2
    order, sizes, first = [], [], 0
    for t, h, w in grids:
        rows, columns = h // config.merge_size, w // config.merge_size
        index = torch.arange(t * rows * columns, device="cpu").view(t, rows, columns) + first
        for frame in index:
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    window = frame[top : top + side, left : left + side].flatten()
                    order.append(window)
                    sizes.append(unit * window.numel())
        first += t * rows * columns
    return torch.cat(order), sizes
