"""``python -m benchmarks.floor RESULTS.json``: how fast the machine lets the fast engine be.

Measures the best bfloat16 product and the read bandwidth of this machine, counts the operations
and bytes the fast engine cannot avoid from the model's shape, and prints the time below which it
cannot go beside what was measured: the measured official time over that floor bounds every
speed-up that keeps the numbers.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cost import WIDTH, Decoder, Vision
from benchmarks.shaped import SHAPES
from ume_models.backbone.config import BackboneConfig, parse_config
from ume_models.cli.bench.reading import read_results
from ume_models.errors import DataError
from ume_models.machine import cpu_name

SHAPE = "qwen2-vl-2b"
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


def floor(
    config: BackboneConfig, machine: Machine, prompt: float, cached: int, visual: int, batch: int
) -> float:
    """Seconds per sample of the fast engine at the machine's limits.

    Vision and prefill are arithmetic; a pass over few tokens takes the longer of its arithmetic
    and of reading the weights. Attention, norms and activations count as free.
    """
    text, tower = Decoder(config).products, Vision(config.vision)

    def one_pass(tokens: int) -> float:
        return max(2 * tokens * text / machine.flops, WIDTH * text / machine.bandwidth)

    patches = visual * config.vision.merge_size**2
    vision = 2 * patches * config.vision.depth * tower.block_products / machine.flops
    prefill = 2 * (prompt - cached) * text / machine.flops
    rolled = (LATENTS - 1) * one_pass(batch) + one_pass(batch * SUFFIX)
    return vision + prefill + rolled / batch


# cached header tokens, visual tokens and batch of the cases of test_engine
CASES = {
    "text, batch 16": (20, 0, 16),
    "image of 256 tokens, batch 4": (15, 256, 4),
    "one text item": (20, 0, 1),
    "one image of 256 tokens": (15, 256, 1),
}


def measured_cases(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Best round of both engines in seconds per sample, and prompt tokens, by case.

    Only what ran on the shapes the floor is counted for.
    """
    cases: dict[str, dict[str, float]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        if entry["group"] not in CASES or info.get("shape", SHAPE) != SHAPE:
            continue
        case = cases.setdefault(entry["group"], {})
        case[info["engine"]] = entry["stats"]["min"] / info["samples"]
        if info["engine"] == "fast":
            case["tokens"] = info["prompt_tokens"]
    return cases


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="of test_engine.py with --size full")
    path = parser.parse_args().results
    try:
        kept = read_results(path).kept
    except DataError as error:
        parser.error(str(error))
    measured = measured_cases(kept) if "benchmarks" in kept else {}
    if set(measured) != set(CASES):
        raise SystemExit(f"{path} lacks test_engine.py with --size full")
    machine = measure()
    config = parse_config(SHAPES[SHAPE])
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"best bf16 product {machine.flops / 1e9:.0f} GFLOP/s, ", end="")
    print(f"reading {machine.bandwidth / 1e9:.0f} GB/s\n")
    print("| input | official loop | fast engine | its floor | ratio | ratio at the floor |")
    print("|---|---|---|---|---|---|")
    for name, (cached, visual, batch) in CASES.items():
        row = measured[name]
        least = floor(config, machine, row["tokens"], cached, visual, batch)
        slow, fast = row["reference"], row["fast"]
        print(
            f"| {name} | {slow:.2f} s | {fast:.2f} s | {least:.2f} s "
            f"| {slow / fast:.1f}× | {slow / least:.1f}× |"
        )


if __name__ == "__main__":
    main()
