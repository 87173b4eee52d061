"""``python -m benchmarks.floor``: how fast the machine lets the fast engine be.

Measures the best bfloat16 product and the read bandwidth of this machine, counts the operations
and bytes of both engines from the model's shape, and prints the time below which neither can go.
The ratio of the floors bounds every speed-up that keeps the numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.shaped import SHAPES
from ume_models.backbone.config import BackboneConfig, parse_config
from ume_models.commands.machine import cpu_name

SUFFIX = 6
LATENTS = 8


@dataclass(frozen=True)
class Machine:
    """Measured limits: bf16 operations per second and bytes read per second."""

    flops: float
    bandwidth: float


def best_time(work: object, rounds: int = 5) -> float:
    """Shortest of some calls, in seconds."""
    assert callable(work)
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure() -> Machine:
    """Best product over the shapes of the prefill, and a plain sum over 1 GB."""
    flops = 0.0
    for m, n, k in ((1440, 8960, 1536), (1440, 1536, 8960), (1024, 5120, 1280)):
        x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        flops = max(flops, 2 * m * n * k / best_time(lambda x=x, w=w: F.linear(x, w)))
    block = torch.ones(1 << 27, dtype=torch.int64)
    return Machine(flops, block.nbytes / best_time(block.sum))


@dataclass(frozen=True)
class Model:
    """Parameters that a pass multiplies with, and operations of attention are left out."""

    text: int
    head: int
    vision: int

    @classmethod
    def of(cls, config: BackboneConfig) -> Model:
        """Count from the shape."""
        width, inner = config.hidden_size, config.intermediate_size
        kv = config.num_kv_heads * config.head_dim
        heads = config.num_heads * config.head_dim
        layer = width * (2 * heads + 2 * kv) + 3 * width * inner
        v = config.vision
        block = 4 * v.embed_dim**2 + 2 * v.embed_dim * v.intermediate_size
        return cls(config.num_layers * layer, width * config.vocab_size, v.depth * block)


def floors(
    model: Model, machine: Machine, prompt: int, cached: int, visual: int, batch: int
) -> tuple[float, float]:
    """Seconds per sample of the official loop and of the fast engine, at the machine's limits.

    A pass over few tokens takes the longer of its arithmetic and of reading the weights.
    """

    def one_pass(tokens: int) -> float:
        return max(2 * tokens * model.text / machine.flops, 2 * model.text / machine.bandwidth)

    vision = 2 * 4 * max(visual, 4) * model.vision / machine.flops
    head = 2 * prompt * model.head / machine.flops
    official = vision + one_pass(prompt) + head + (LATENTS + 1) * one_pass(1) + one_pass(SUFFIX - 1)
    seen_vision = vision if visual else 0.0
    prefill = 2 * (prompt - cached) * model.text / machine.flops
    rolled = (LATENTS - 1) * one_pass(batch) + one_pass(batch * SUFFIX)
    return official, seen_vision + prefill + rolled / batch


def main() -> None:
    """Print the table."""
    machine = measure()
    model = Model.of(parse_config(SHAPES["qwen2-vl-2b"]))
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"best bf16 product {machine.flops / 1e9:.0f} GFLOP/s, ", end="")
    print(f"reading {machine.bandwidth / 1e9:.0f} GB/s\n")
    print("| input | floor, official loop | floor, fast engine | largest possible ratio |")
    print("|---|---|---|---|")
    for name, prompt, cached, visual, batch in (
        ("text, batch 16", 102, 20, 0, 16),
        ("image of 256 tokens, batch 4", 344, 15, 256, 4),
        ("one text item", 102, 20, 0, 1),
        ("one image of 256 tokens", 344, 15, 256, 1),
    ):
        official, fast = floors(model, machine, prompt, cached, visual, batch)
        print(f"| {name} | {official:.2f} s | {fast:.2f} s | {official / fast:.1f}× |")


if __name__ == "__main__":
    main()
