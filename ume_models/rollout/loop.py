"""The loop after the prefill, a function of tensors: K adapter and decode passes, then the suffix.

The same body runs eagerly and under a CUDA graph, so nothing in it reads a device value on the
host, copies from the host or depends on a value: lengths, steps and inputs are device tensors or
constants of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_kernels import DecoderLayerWeights
from ume_models.backbone.text import RopeTable, TextModel

Transition = Callable[[torch.Tensor, "torch.Tensor | None", int], torch.Tensor]
"""``(z [B, D], context, step) -> z' [B, D]``."""


@dataclass(frozen=True)
class LatentLoop:
    """What the loop needs besides its inputs.

    Attributes:
        text: the decoder.
        layers: its ``layer_weights()``.
        rope: rotary tables that reach the longest row.
        transition: the adapter.
        suffix: int64 ``[n]`` forced tokens after the latents, on the device.
        steps: K ≥ 0.
    """

    text: TextModel
    layers: Sequence[DecoderLayerWeights]
    rope: RopeTable
    transition: Transition
    suffix: torch.Tensor
    steps: int

    @property
    def grows(self) -> tuple[int, ...]:
        """How many tokens longer than the prompt a row is after each pass."""
        total = self.steps + len(self.suffix)
        return (*range(1, self.steps), total)

    def run(
        self,
        z: torch.Tensor,
        context: torch.Tensor | None,
        lengths: torch.Tensor,
        cache: torch.Tensor,
        bounds: Sequence[int],
        keep_latents: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Roll out.

        Args:
            z: ``[B, D]`` hidden states of the last prompt tokens.
            context: router context ``[B, D]`` or None.
            lengths: int64 ``[B]`` prompt tokens cached; not changed.
            cache: the arena, rows 0 … B - 1; written behind ``lengths``.
            bounds: host-side bound on the length of every row after each pass of ``grows``.
            keep_latents: also return the hidden state after each latent step.

        Returns:
            Hidden states ``[B, D]`` at the last suffix token and, with ``keep_latents``, the
            latents ``[B, K, D]``.
        """
        batch = z.shape[0]
        # One row of lengths per pass, made at once: a pass then costs no launch for it.
        ladder = lengths + torch.arange(max(self.steps, 1), device=lengths.device)[:, None]
        latents: list[torch.Tensor] = []
        for step in range(self.steps - 1):
            embeds = self.transition(z, context, step)[:, None]
            z = self._decode(embeds, ladder[step], cache, bounds[step])[:, 0]
            if keep_latents:
                latents.append(z)
        chunk = F.embedding(self.suffix, self.text.embed_tokens.weight).expand(batch, -1, -1)
        if self.steps:
            final = self.transition(z, context, self.steps - 1)[:, None]
            chunk = torch.cat([final, chunk], dim=1)
        out = self._decode(chunk, ladder[-1], cache, bounds[-1])
        if not keep_latents:
            return (out[:, -1],)
        if self.steps:
            latents.append(out[:, 0])
        stacked = torch.stack(latents, 1) if latents else z.new_zeros(batch, 0, z.shape[1])
        return out[:, -1], stacked

    def _decode(
        self, embeds: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor, bound: int
    ) -> torch.Tensor:
        return self.text.decode(embeds, lengths, cache, bound, self.layers, self.rope)
