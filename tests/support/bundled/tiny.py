"""Train the small PLUME checkpoint that ships with the package.

    python -m tests.support.bundled.tiny -o DIR

Everything it learns from is made on the spot (shapes, charts, pages, clips) or bundled with
scikit-learn (handwritten digits). Two CPU cores need about half an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn

from ume_models.backbone.config import parse_config

from .card import write_card
from .checkpoint import architecture, save_checkpoint
from .data import Encoder, Sampler
from .evaluate import evaluate, rank
from .families import FAMILIES
from .heldout import HeldOutTask, build_heldout
from .network import PlumeNetwork
from .step import AttributeHeads, LossWeights, training_loss
from .tasks import TASKS, Task
from .tokens import corpus, train_tokenizer

# How often each task is drawn; reading small print takes a small model longest.
TASK_WEIGHTS = {
    "scene_t2i": 2, "scene_i2t": 2, "scene_i2i": 1, "digits_i2t": 2, "digits_i2i": 2,
    "clip_t2v": 2, "clip_v2t": 2, "chart_t2p": 3, "page_t2p": 4,
}  # fmt: skip

# Curriculum: parts of the run with the anchor alone, and until K has reached its final value.
ANCHOR_SHARE, GROWTH_END = 0.65, 0.78


@dataclass(frozen=True)
class TrainingConfig:
    """Knobs of a run.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs per step and worker; a worker's pairs are each other's negatives.
        workers: processes of one thread each, whose gradients are averaged. On a busy machine
            they wait for each other once a step, threads would in every operation.
        mixed_every: every so many steps the batch holds four tasks instead of one, so that
            pictures of different families stay apart too.
        num_latents: K at the end of the curriculum.
        peak_lr: learning rate after the warm-up; cosine to 2 % of it.
        pictures: pictures rendered per family and worker.
        seed: everything random follows from it.
        families: families to train on.
        log_every, evaluate_every: progress lines and held-out metrics; 0 turns them off.
    """

    steps: int = 1200
    batch_size: int = 96
    workers: int = 2
    mixed_every: int = 5
    num_latents: int = 8
    peak_lr: float = 2e-3
    pictures: int = 5000
    seed: int = 0
    families: tuple[str, ...] = tuple(FAMILIES)
    log_every: int = 20
    evaluate_every: int = 200


_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")


def initialise(network: PlumeNetwork, seed: int) -> None:
    """Scaled initialisation: small embeddings, residual branches shrunk by depth."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim < 2:
                if name.endswith("bias"):
                    parameter.zero_()
                continue
            std = parameter[0].numel() ** -0.5 * 0.8
            if name.endswith(("embed_tokens.weight", "step_embed.weight")):
                std = 0.1
            if name.endswith(_RESIDUAL_OUTPUTS):
                std /= math.sqrt(2 * network.config.num_layers)
            parameter.normal_(0.0, std, generator=generator)


def num_latents_at(progress: float, final: int, rng: Random) -> int | None:
    """Curriculum: the anchor alone (None), then K grows from 0 to ``final``.

    Seeing and reading is learned at the anchor, at a third of a full step's cost. At the end
    one step in ten draws K at random, so that shorter rollouts keep working.
    """
    if progress < ANCHOR_SHARE:
        return None
    if progress >= GROWTH_END:
        return rng.randint(0, final) if rng.random() < 0.1 else final
    return round(final * (progress - ANCHOR_SHARE) / (GROWTH_END - ANCHOR_SHARE))


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up over 4 % of the steps, then cosine to 2 % of the peak."""
    warm = max(1, config.steps // 25)
    if step < warm:
        return config.peak_lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Trained:
    """What a run leaves: the model, what it needs, and the last loss of every logged step."""

    network: PlumeNetwork
    encoder: Encoder
    tokenizer: Tokenizer
    model_config: dict[str, Any]
    losses: list[float]


def _place() -> tuple[int, int]:
    """Rank of this worker and number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Replace every gradient by its mean over the workers; a missing one counts as zero."""
    if world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    pieces = (flat / world).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def _optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.98))


def _draw_tasks(
    step: int, tasks: Sequence[Task], config: TrainingConfig, rng: Random
) -> list[Task]:
    weights = [TASK_WEIGHTS[task.name] for task in tasks]
    count = 4 if config.mixed_every and step % config.mixed_every == 0 else 1
    return rng.choices(tasks, weights, k=min(count, len(tasks)))


def train(
    config: TrainingConfig,
    output: Path | None = None,
    sets: Sequence[HeldOutTask] = (),
    **changes: Any,
) -> Trained:
    """Train from scratch.

    Args:
        config: knobs of the run.
        output: where to write a checkpoint at every evaluation; None writes nothing.
        sets: held-out sets to watch.
        changes: entries of the architecture to replace, see ``architecture``.
    """
    tokenizer = train_tokenizer(config.seed)
    model_config = architecture(tokenizer, **changes)
    network = PlumeNetwork(parse_config(model_config))
    initialise(network, config.seed)
    torch.manual_seed(config.seed)
    heads = AttributeHeads(network.config.hidden_size)
    encoder = Encoder(tokenizer, network.config)
    parameters = [*network.parameters(), *heads.parameters()]
    rank, world = _place()
    started = time.perf_counter()
    sampler = Sampler(encoder, config.seed * 1000 + rank, config.pictures, config.families)
    if config.log_every and rank == 0:
        print(f"pictures rendered in {time.perf_counter() - started:.0f} s", flush=True)
    optimizer = _optimizer(parameters, config)
    tasks = [task for task in TASKS if task.family in config.families]
    shared_rng = Random(f"{config.seed}/schedule")
    rng = Random(f"{config.seed}/tasks/{rank}")
    losses: list[float] = []
    for step in range(config.steps):
        progress = step / config.steps
        num_latents = num_latents_at(progress, config.num_latents, shared_rng)
        scale = 50.0 * min(1.0, 0.4 + 1.5 * progress)
        weights = LossWeights(attributes=0.1 + 0.9 * max(0.0, 1 - 1.4 * progress))
        drawn = _draw_tasks(step, tasks, config, rng)
        groups = [sampler.group(task, config.batch_size // len(drawn)) for task in drawn]
        network.train()
        loss, terms = training_loss(network, heads, encoder, groups, num_latents, scale, weights)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if rank:
            continue
        if config.log_every and (step + 1) % config.log_every == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
            names = "+".join(task.name for task in drawn)
            print(
                f"{time.perf_counter() - started:6.0f} s  step {step + 1:5d}  K {num_latents}  "
                f"loss {losses[-1]:.3f}  {shown}  {names}",
                flush=True,
            )
        if config.evaluate_every and (step + 1) % config.evaluate_every == 0:
            if output is not None:
                save_checkpoint(network, model_config, tokenizer, output)
            if sets:
                _print_metrics(step + 1, evaluate(network, encoder, sets, num_latents))
    if output is not None and rank == 0:
        save_checkpoint(network, model_config, tokenizer, output)
    network.eval()
    return Trained(network, encoder, tokenizer, model_config, losses)


def _print_metrics(step: int, result: dict[str, Any]) -> None:
    cells = [f"{name} {task['hit@1']:.2f}" for name, task in result["tasks"].items()]
    print(
        f"held out, step {step}, K {result['num_latents']}: mean hit@1 "
        f"{result['mean']['hit@1']:.3f} mrr {result['mean']['mrr']:.3f} | {' '.join(cells)} | "
        f"not stopping {result['not_stopping']}",
        flush=True,
    )


def full_evaluation(
    trained: Trained, config: TrainingConfig, sets: Sequence[HeldOutTask], seconds: float
) -> dict[str, Any]:
    """``evaluation.json``: held-out metrics, and what fewer latent steps or none would give."""
    network, encoder = trained.network, trained.encoder
    result = evaluate(network, encoder, sets, config.num_latents)
    by_steps = {
        str(k): evaluate(network, encoder, sets, k)["mean"]["hit@1"] for k in (0, 1, 2, 4, 6, 8)
    }
    disc = [rank(network, encoder, s, config.num_latents, "disc")[0]["hit@1"] for s in sets]
    return {
        "about": (
            "Held-out retrieval of the bundled checkpoint: combinations and digits never seen in "
            "training, every query has one relevant candidate. Written by "
            "tests.support.bundled.tiny."
        ),
        **result,
        "hit@1_by_num_latents": by_steps,
        "hit@1_disc": round(sum(disc) / len(disc), 4),
        "training": {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "minutes": round(seconds / 60, 1),
            "workers": config.workers,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }


def run(config: TrainingConfig, output: Path) -> None:
    """Train, and leave checkpoint and ``evaluation.json`` in ``output``."""
    with tempfile.TemporaryDirectory() as meeting_place:
        store = Path(meeting_place) / "store"
        if config.workers == 1:
            _work(0, config, output, store)
        else:
            torch.multiprocessing.spawn(_work, (config, output, store), config.workers)


def _work(rank: int, config: TrainingConfig, output: Path, store: Path) -> None:
    torch.set_num_threads(1)
    if config.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=config.workers
        )
    sets = build_heldout(config.seed, queries=100, candidates=100)
    started = time.perf_counter()
    trained = train(config, output, sets)
    if rank == 0:
        result = full_evaluation(trained, config, sets, time.perf_counter() - started)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (output / "evaluation.json").write_text(text, encoding="utf-8")
        words = {word.strip(".,:?") for line in corpus(config.seed) for word in line.split()}
        write_card(output, round(len(words), -1))
        _print_metrics(config.steps, result)
    if config.workers > 1:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.bundled.tiny", description="Train the bundled checkpoint."
    )
    defaults = TrainingConfig()
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--workers", type=int, default=defaults.workers)
    parser.add_argument("--lr", type=float, default=defaults.peak_lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(arguments)
    config = TrainingConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        workers=options.workers,
        peak_lr=options.lr,
        seed=options.seed,
    )
    run(config, options.output)


if __name__ == "__main__":
    main()
