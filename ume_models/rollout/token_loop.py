"""A few decode steps in which every row is fed its own last token: a function of tensors.

The same body runs eagerly and under a CUDA graph: it reads no device value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ume_kernels import DecoderLayerWeights
from ume_models.backbone.text import RopeTable, TextModel

Choose = Callable[[torch.Tensor, int, Mapping[str, torch.Tensor]], torch.Tensor]
"""``(hidden [B, D], step, state) -> token [B]``."""

NOTHING = -1
"""What a row that has ended puts out."""

PER_ROW = ("last", "marked", "token", "lengths", "offsets", "left")
"""The state of a row: ``last`` and ``marked`` ``[B, D]`` are the states of its latest step and of
the latest one that consumed the marker, ``token`` is fed next, ``lengths`` are cached, ``offsets``
lead from there to positions, ``left`` tokens may follow."""


@dataclass(frozen=True)
class TokenLoop:
    """What the steps need besides the rows' state.

    Attributes:
        text: the decoder.
        layers: its ``layer_weights()``.
        rope: rotary tables that reach every position.
        choose: the next token of a state.
        stops: int64 ``[n]`` on the device: tokens that end a row.
        marker: the token at which the state is kept; negative for none.
        steps: decode steps, at least one.
    """

    text: TextModel
    layers: Sequence[DecoderLayerWeights]
    rope: RopeTable
    choose: Choose
    stops: torch.Tensor
    marker: int
    steps: int

    def run(
        self, state: Mapping[str, torch.Tensor], cache: torch.Tensor, bound: int
    ) -> tuple[torch.Tensor, ...]:
        """Go on.

        Args:
            state: tensors of ``PER_ROW``; not changed.
            cache: the arena; row r is slot r.
            bound: host-side bound on every length afterwards.

        Returns:
            ``last``, ``marked``, ``token``, ``lengths``, ``left`` as they are then, and the tokens
            put out ``[B, steps]``, ``NOTHING`` where a row had ended before.
        """
        last, marked, token, lengths, offsets, left = (state[name] for name in PER_ROW)
        put_out: list[torch.Tensor] = []
        for step in range(self.steps):
            embeds = F.embedding(token, self.text.embed_tokens.weight)[:, None]
            hidden = self.text.decode(
                embeds, lengths, cache, bound, self.layers, self.rope, offsets
            )[:, 0]
            going = left > 0
            reading = going & (token == self.marker)
            last = torch.where(going[:, None], hidden, last)
            marked = torch.where(reading[:, None], hidden, marked)
            chosen = self.choose(hidden, step, state)
            put_out.append(torch.where(going, chosen, NOTHING))
            # A row that has ended goes on computing its last step, in the same place.
            lengths = lengths + going
            token = torch.where(going, chosen, token)
            left = torch.where(going & torch.isin(chosen, self.stops), 0, left - going.long())
        return last, marked, token, lengths, left, torch.stack(put_out, dim=1)
