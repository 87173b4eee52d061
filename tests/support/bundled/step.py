"""The batched latent training step: embeddings with gradients, and the losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import ume_kernels

from .data import Encoder, Group, Side
from .families import FAMILIES
from .network import PlumeNetwork, Prefill


@dataclass
class Embedded:
    """One side after the rollout.

    Attributes:
        disc: ``[B, D]`` hidden state at ``<disc_emb>``, not normalised.
        gen: ``[B, D]`` hidden state at the suffix's ``<gen_emb>``, not normalised; None where
            only the anchor was computed, as are the following.
        balance: mean balance loss of the latent steps (0 for none).
        suffix_logits: ``[B, 1 + suffix, V]``, predictions of the suffix and of ``<|im_end|>``.
    """

    disc: torch.Tensor
    gen: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    suffix_logits: torch.Tensor | None = None


def prefill_side(network: PlumeNetwork, side: Side, anchor_only: bool) -> Prefill:
    """Run the prefix of a batch, tapped at ``<disc_emb>`` and, unless ``anchor_only``, ``<bot>``.

    Text-only rows share everything up to and including the blank picture, others the system
    turn. An anchor alone needs nothing that comes after it.
    """
    visual = network.visual_tokens(side.patches, side.grid)
    start = side.visual_start
    after = start + visual.shape[1]
    taps, stop = side.taps, side.ids.shape[1]
    if anchor_only:
        taps = taps[:, :1]
        stop = int(taps.max()) + 1
    opening = network.embed(side.ids[:1, :start])
    rest = network.embed(side.ids[:, after:stop])
    if len(visual) == 1 and len(rest) > 1:
        opening = torch.cat([opening, visual], dim=1)
    else:
        rest = torch.cat([visual, rest], dim=1)
    lengths = side.lengths.clamp(max=stop)
    return network.prefill(opening, rest, side.positions[:, :stop], lengths, taps)


def embed_side(
    network: PlumeNetwork, encoder: Encoder, side: Side, num_latents: int | None
) -> Embedded:
    """Prefix, ``num_latents`` transitions, suffix: the whole generative path for a batch.

    Latent step k feeds ``moe_transition(z, k, <disc_emb> state)`` at the row's own cache length
    on all three axes; the last one goes through the backbone together with the suffix.
    ``num_latents=None`` stops at ``<disc_emb>``.
    """
    state = prefill_side(network, side, anchor_only=num_latents is None)
    disc = state.taps[:, 0]
    if num_latents is None:
        return Embedded(disc)
    first = z = state.taps[:, 1]
    chunk = network.embed(encoder.suffix).expand(len(z), -1, -1)
    balance = z.new_zeros(())
    for k in range(num_latents):
        z, aux = network.latent_moe_transition(z, k, disc)
        balance = balance + aux["balance_loss"] / num_latents
        if k < num_latents - 1:
            z = network.extend(z[:, None], state, k)[:, 0]
    if num_latents:
        chunk = torch.cat([z[:, None], chunk], dim=1)
    hidden = network.extend(chunk, state, max(num_latents - 1, 0))
    if not num_latents:
        hidden = torch.cat([first[:, None], hidden], dim=1)
    return Embedded(disc, hidden[:, -1], balance, network.logits(hidden))


def contrastive_loss(
    queries: torch.Tensor, targets: torch.Tensor, keys: Sequence[str], scale: float
) -> torch.Tensor:
    """Bidirectional InfoNCE of normalised ``[N, D]`` rows; off-diagonal equal keys are left out."""
    names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    ids = torch.tensor([names[key] for key in keys])
    same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
    ignore = same.nonzero().to(queries.device)
    return ume_kernels.contrastive_loss(queries, targets, scale=scale, ignore=ignore)


class AttributeHeads(nn.Module):
    """Linear readouts of what a picture shows, used in training only and never saved.

    They give every sample a signal of its own (colour, shape, digit, …) long before the
    contrastive loss can tell a hundred similar scenes apart; without them a model this small
    needs many times more steps.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden_size, sum(f.slots)) for name, f in FAMILIES.items()}
        )

    def forward(self, hidden: torch.Tensor, family: str, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the slots of ``family`` for ``hidden [B, D]``."""
        logits = self.heads[family](hidden).split(list(FAMILIES[family].slots), dim=-1)
        losses = [F.cross_entropy(slot, classes[:, i]) for i, slot in enumerate(logits)]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of ``training_loss``; gen has weight 1."""

    disc: float = 0.5
    balance: float = 0.1
    suffix: float = 0.05
    attributes: float = 0.5


def training_loss(
    network: PlumeNetwork,
    heads: AttributeHeads,
    encoder: Encoder,
    groups: Sequence[Group],
    num_latents: int | None,
    scale: float,
    weights: LossWeights,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of one step over ``groups`` (their pairs are each other's negatives).

    Returns:
        ``(loss, terms)`` with the detached value of every term; only the anchor's terms where
        ``num_latents`` is None.
    """
    sides: list[list[Embedded]] = [[], []]
    terms: dict[str, torch.Tensor] = {}

    def add(name: str, value: torch.Tensor) -> None:
        terms[name] = terms[name] + value if name in terms else value

    share = 0.5 / len(groups)
    for group in groups:
        for which, side in enumerate((group.queries, group.targets)):
            out = embed_side(network, encoder, side, num_latents)
            sides[which].append(out)
            read = [out.disc] if out.gen is None else [out.disc, out.gen]
            for hidden in read:
                loss = heads(hidden, group.task.family, group.attributes)
                add("attributes", share / len(read) * loss)
            if out.balance is not None and out.suffix_logits is not None:
                add("balance", share * out.balance)
                labels = encoder.suffix_labels.expand(len(out.disc), -1)
                logits = out.suffix_logits.flatten(0, 1)
                add("suffix", share * F.cross_entropy(logits, labels.flatten()))
    keys = [key for group in groups for key in group.keys]
    for name in ("disc",) if num_latents is None else ("disc", "gen"):
        rows = [torch.cat([getattr(out, name) for out in side]) for side in sides]
        add(name, contrastive_loss(rows[0], rows[1], keys, scale))
    factors = {"gen": 1.0, **vars(weights)}
    total = torch.stack([factors[name] * value for name, value in terms.items()]).sum()
    return total, {name: float(value.detach()) for name, value in terms.items()}
