"""Ranking quality on held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .data import Encoder, Side
from .heldout import Entry, HeldOutTask
from .network import PlumeNetwork
from .step import Embedded, embed_side


def encode_entries(encoder: Encoder, instruction: str, entries: Sequence[Entry]) -> Side:
    """The entries of one side as a uniform batch."""
    pixels = [entry.pixels for entry in entries if entry.pixels is not None]
    if pixels:
        return encoder.pictures(instruction, np.stack(pixels))
    return encoder.texts(instruction, [entry.caption for entry in entries])


@torch.no_grad()
def rank(
    network: PlumeNetwork,
    encoder: Encoder,
    heldout: HeldOutTask,
    num_latents: int | None,
    mode: str = "gen",
) -> tuple[dict[str, float], int]:
    """Metrics of one task, and how many inputs would not stop after ``<gen_emb>``.

    Returns:
        ``({"hit@1", "hit@5", "mrr", "chance_hit@1", "queries", "candidates"}, count)``
    """
    task = heldout.task
    sides: list[Embedded] = [
        embed_side(network, encoder, encode_entries(encoder, instruction, entries), num_latents)
        for instruction, entries in (
            (task.query_instruction, heldout.queries),
            (task.target_instruction, heldout.candidates),
        )
    ]
    mode = "disc" if num_latents is None else mode
    queries, candidates = (F.normalize(getattr(side, mode), dim=-1) for side in sides)
    order = (queries @ candidates.T).argsort(dim=1, descending=True, stable=True)
    best = []
    for ranking, wanted in zip(order.tolist(), heldout.relevant(), strict=True):
        best.append(min(ranking.index(i) for i in wanted) + 1)
    ranks = np.array(best, dtype=float)
    chance = np.mean([len(wanted) / len(candidates) for wanted in heldout.relevant()])
    stop = int(encoder.suffix_labels[-1])
    running = 0
    for side in sides:
        if side.suffix_logits is not None:
            running += int((side.suffix_logits[:, -1].argmax(-1) != stop).sum())
    metrics = {
        "hit@1": float((ranks <= 1).mean()),
        "hit@5": float((ranks <= 5).mean()),
        "mrr": float((1 / ranks).mean()),
        "chance_hit@1": float(chance),
        "queries": len(queries),
        "candidates": len(candidates),
    }
    return metrics, running


def evaluate(
    network: PlumeNetwork, encoder: Encoder, sets: Sequence[HeldOutTask], num_latents: int | None
) -> dict[str, Any]:
    """Metrics of every task: ``{"tasks": {name: metrics}, "not_stopping": count, …}``."""
    network.eval()
    tasks, running = {}, 0
    for heldout in sets:
        metrics, count = rank(network, encoder, heldout, num_latents)
        running += count
        tasks[heldout.task.name] = {
            "kind": heldout.task.kind,
            **{name: round(value, 4) for name, value in metrics.items()},
        }
    mean = {
        name: round(float(np.mean([task[name] for task in tasks.values()])), 4)
        for name in ("hit@1", "hit@5", "mrr")
    }
    return {"num_latents": num_latents, "mean": mean, "tasks": tasks, "not_stopping": running}
