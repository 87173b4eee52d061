"""One latent training step, forward and backward, of ``tests.support.bundled``.

    pytest benchmarks/test_training.py --benchmark-only --benchmark-json=out.json

The architecture is that of the bundled model. The official training takes one sample at a time
through prefix, latent steps and suffix; the rival is batched as autograd makes it easy: nothing
shared between rows, the matrix of scores in memory. The same pairs, the same loss. (The contrastive
loss alone is in ``test_similarity.py``.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.record import record
from benchmarks.scale import scale
from benchmarks.similarity_engines import SCALE, materialised
from tests.support.bundled.checkpoint import architecture
from tests.support.bundled.data import Encoder, Group, Sampler, Side
from tests.support.bundled.network import PlumeNetwork
from tests.support.bundled.step import Embedded, contrastive_loss, embed_side
from tests.support.bundled.tasks import TASKS
from tests.support.bundled.tiny import initialise
from tests.support.bundled.tokens import train_tokenizer
from ume_models.backbone.config import parse_config

SIZE = scale()
STEPS = 2 if SIZE.tiny else 8
KINDS = {"scene_t2i": "text → image", "page_t2p": "text → page"}
ENGINES = {
    "tests.support.bundled": "ours",
    "one sample at a time": "reference",
    "batched, nothing shared": "rival",
}

pytestmark = pytest.mark.skipif(
    SIZE.device.type == "cuda", reason="tests.support.bundled trains small models, on a CPU"
)


@pytest.fixture(scope="module")
def network() -> tuple[PlumeNetwork, Encoder]:
    tokenizer = train_tokenizer(0)
    network = PlumeNetwork(parse_config(architecture(tokenizer)))
    initialise(network, 0)
    return network, Encoder(tokenizer, network.config)


def row(side: Side, number: int) -> Side:
    """One sample, without its padding."""
    length = int(side.lengths[number])
    one = slice(number, number + 1)
    return replace(
        side,
        ids=side.ids[one, :length],
        lengths=side.lengths[one],
        taps=side.taps[one],
        positions=side.positions[:, :length],
        patches=side.patches[one] if len(side.patches) > 1 else side.patches,
    )


Embed = Callable[[PlumeNetwork, Encoder, Side], Embedded]


def batched(network: PlumeNetwork, encoder: Encoder, side: Side) -> Embedded:
    return embed_side(network, encoder, side, STEPS)


def one_by_one(network: PlumeNetwork, encoder: Encoder, side: Side) -> Embedded:
    every = [embed_side(network, encoder, row(side, n), STEPS) for n in range(len(side.ids))]
    parts = {name: [getattr(e, name) for e in every] for name in vars(every[0])}
    balance = torch.stack(parts.pop("balance")).mean()
    return Embedded(**{k: torch.cat(v) for k, v in parts.items()}, balance=balance)


def nothing_shared(network: PlumeNetwork, encoder: Encoder, side: Side) -> Embedded:
    patches = side.patches.expand(len(side.ids), *side.patches.shape[1:])
    return embed_side(network, encoder, replace(side, patches=patches), STEPS)


EMBED: dict[str, Embed] = dict(zip(ENGINES, (batched, one_by_one, nothing_shared), strict=True))


def step(network: PlumeNetwork, encoder: Encoder, group: Group, engine: str) -> tuple[float, float]:
    """Forward and backward; the loss without the balance, and the balance loss.

    The balance of one sample at a time is another one, as in the official training.
    """
    network.zero_grad()
    sides = [EMBED[engine](network, encoder, side) for side in (group.queries, group.targets)]
    total, balance = torch.zeros(()), torch.zeros(())
    for out in sides:
        assert out.suffix_logits is not None
        assert out.balance is not None
        labels = encoder.suffix_labels.expand(len(out.disc), -1)
        total = total + F.cross_entropy(out.suffix_logits.flatten(0, 1), labels.flatten())
        balance = balance + out.balance
    for name in ("disc", "gen"):
        q, p = (getattr(out, name) for out in sides)
        ours = engine == "tests.support.bundled"
        total = total + (contrastive_loss(q, p, group.keys, SCALE) if ours else materialised(q, p))
    (total + 0.1 * balance).backward()
    return float(total.detach()), float(balance.detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(
    benchmark: Any, network: tuple[PlumeNetwork, Encoder], kind: str, engine: str
) -> None:
    [task] = [task for task in TASKS if task.name == kind]
    sampler = Sampler(network[1], 0, pictures=4 * SIZE.pairs, families=(task.family,))
    group = sampler.group(task, SIZE.pairs)
    assert len(set(group.keys)) == len(group.keys), "every pair is every other's negative"
    found = record(
        benchmark, lambda: step(*network, group, engine), section="training",
        group=f"training step, {SIZE.pairs} pairs {KINDS[kind]}, K = {STEPS}",
        engine=engine, role=ENGINES[engine],  # type: ignore[arg-type]
        samples=SIZE.pairs, rounds=3, filled=False, loss=None,
    )  # fmt: skip
    want = step(*network, group, "tests.support.bundled")
    assert found[0] == pytest.approx(want[0], rel=1e-4)
