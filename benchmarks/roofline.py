"""``python -m benchmarks.roofline``: how fast a GPU lets each operation be, from the model's shape.

The floor of an operation is the longer of moving its bytes at the memory's bandwidth and of its
operations at the tensor cores' peak, added up over the parts that wait for each other. Targets
are shares of it. Nothing is measured and no GPU is needed.

    python -m benchmarks.roofline --model 7b --batch 1 64 --prefix 300 1000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cost import (
    Adapter,
    Decoder,
    Vision,
    Work,
    contrastive_loss,
    rollout,
    similarity_topk,
)
from benchmarks.datasheets import A100_80G, H100_SXM, H200, Gpu
from benchmarks.floor import LATENTS
from benchmarks.floor import SUFFIX as CHUNK
from benchmarks.shaped import SHAPES
from ume_models.backbone.config import BackboneConfig, parse_config, read_config
from ume_models.errors import CheckpointError

SUFFIX = CHUNK - 1
"""Forced tokens; the last latent input goes with them."""
BATCH = 64
"""Items of a whole embedding."""
VISUAL = 256
TEXT_PROMPT, IMAGE_PROMPT = 100, 344
TEXT_CACHED, IMAGE_CACHED = 20, 15
"""Tokens of the prompts of ``benchmarks.shaped`` and how many are a constant header."""

ADAPTER_TARGET = 0.7
SINGLE_TARGET = 0.7
BATCH_TARGET = 0.6
"""Shares of the floor to reach: adapter, one row of latent steps, many rows."""

_QWEN2_VL = SHAPES["qwen2-vl-2b"]
MODELS: dict[str, dict[str, Any]] = {
    "2b": _QWEN2_VL,
    "3b": {
        **_QWEN2_VL,
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "7b": {
        **_QWEN2_VL,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN2_VL["vision_config"], "hidden_size": 3584},
    },
}
"""Qwen2-VL-2B, Qwen2.5-VL-3B, Qwen2-VL-7B."""


GPUS = (A100_80G, H100_SXM, H200)
"""Columns of the tables."""


@dataclass(frozen=True)
class Operation:
    """Parts that run one after the other, and the share of the floor to reach (None: none set)."""

    name: str
    parts: tuple[Work, ...]
    target: float | None = None
    samples: int = 0

    @property
    def bytes(self) -> float:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def operations(self) -> float:
        """Operations of all parts."""
        return sum(part.operations for part in self.parts)

    def floor(self, gpu: Gpu) -> float:
        """Seconds below which it cannot be."""
        return sum(max(gpu.moving(part), gpu.computing(part)) for part in self.parts)

    def binds(self, gpu: Gpu) -> str:
        """What the larger part of the floor is spent on: ``"bytes"`` or ``"operations"``."""
        moving = sum(
            gpu.moving(part) for part in self.parts if gpu.moving(part) >= gpu.computing(part)
        )
        return "bytes" if 2 * moving >= self.floor(gpu) else "operations"

    def target_time(self, gpu: Gpu) -> float | None:
        """Seconds at the target's share of the floor."""
        return None if self.target is None else self.floor(gpu) / self.target


def operations(
    config: BackboneConfig, batches: Sequence[int], prefixes: Sequence[int], steps: int
) -> Iterator[Operation]:
    """Every operation of the table."""
    decoder, vision, adapter = Decoder(config), Vision(config.vision), Adapter()
    width = config.hidden_size
    for rows in (1, 4, 64):
        work = adapter.work(width, rows)
        yield Operation(
            f"adapter, {rows} {'row' if rows == 1 else 'rows'}", (work,), ADAPTER_TARGET
        )
    for rows in batches:
        target = SINGLE_TARGET if rows == 1 else BATCH_TARGET
        for prefix in prefixes:
            where = f"{rows} × {prefix} tokens"
            layer = decoder.layer(rows, 1, prefix)
            yield Operation(f"decoder layer, {where}", (layer,), target)
            rolled = rollout(decoder, adapter, rows, prefix, steps, SUFFIX)
            yield Operation(f"rollout of {steps} + suffix, {where}", rolled, target)
    for name, new, cached in (
        ("text", TEXT_PROMPT - TEXT_CACHED, TEXT_CACHED),
        ("image", IMAGE_PROMPT - IMAGE_CACHED, IMAGE_CACHED),
    ):
        for items in (1, BATCH):
            parts = decoder.prefill(items, new, cached)
            yield Operation(f"prefill, {items} × {name} of {new} tokens", parts)
    for items in (1, BATCH):
        yield Operation(f"vision tower, {items} × {VISUAL} tokens", vision.work(items, VISUAL))
    n = 65536
    yield Operation(f"contrastive loss, {n}²", (contrastive_loss(n, n, width, False),))
    yield Operation(
        f"contrastive loss, {n}², with backward", (contrastive_loss(n, n, width, True),)
    )
    yield Operation("top-100 of 10 M, 1,024 queries", (similarity_topk(1024, 10**7, width),))


def embeddings(config: BackboneConfig, steps: int) -> Iterator[tuple[Operation, Operation]]:
    """Whole embeddings of a batch, with latent steps and as a single pass."""
    decoder, vision, adapter = Decoder(config), Vision(config.vision), Adapter()
    text = decoder.prefill(BATCH, TEXT_PROMPT - TEXT_CACHED, TEXT_CACHED)
    image = decoder.prefill(BATCH, IMAGE_PROMPT - IMAGE_CACHED, IMAGE_CACHED)
    for name, before, prefix in (
        ("text", text, TEXT_PROMPT),
        (f"image of {VISUAL} tokens", vision.work(BATCH, VISUAL) + image, IMAGE_PROMPT),
    ):
        rolled = (
            Operation(
                f"{name}, {k} latent steps",
                before + rollout(decoder, adapter, BATCH, prefix, k, SUFFIX),
                samples=BATCH,
            )
            for k in (steps, 0)
        )
        yield next(rolled), next(rolled)


def load(model: str) -> BackboneConfig:
    """A model of ``MODELS``, or the checkpoint in a directory."""
    return parse_config(MODELS[model]) if model in MODELS else read_config(Path(model))


def _amount(value: float, units: str = " KMGTP") -> str:
    for unit in units:
        if value < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value * 1000:.4g} {units[-1]}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms"


def operation_table(title: str, rows: Sequence[Operation]) -> Table:
    """Floor, what binds and target of every operation on every GPU."""
    table = Table(
        title=title,
        caption="B: bytes bind, F: operations bind; → time at the target's share of the floor",
    )
    table.add_column("operation")
    for name in ("bytes", "operations", *(gpu.name for gpu in GPUS), "target"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for gpu in GPUS:
            goal = row.target_time(gpu)
            letter = "B" if row.binds(gpu) == "bytes" else "F"
            arrow = "" if goal is None else f" → {_time(goal)}"
            cells.append(f"{_time(row.floor(gpu))} {letter}{arrow}")
        share = "–" if row.target is None else f"{row.target:.0%}"
        table.add_row(row.name, _amount(row.bytes), _amount(row.operations), *cells, share)
    return table


def embedding_table(pairs: Sequence[tuple[Operation, Operation]]) -> Table:
    """Samples per second at the floor, and what the latent steps add to a single pass."""
    table = Table(title=f"whole embedding at batch {BATCH}, at the floor")
    table.add_column("input")
    for gpu in GPUS:
        table.add_column(f"{gpu.name}: samples/s", justify="right")
        table.add_column("× single pass", justify="right")
    for full, single in pairs:
        cells = []
        for gpu in GPUS:
            time = full.floor(gpu)
            cells += [f"{full.samples / time:,.0f}", f"{time / single.floor(gpu):.2f}"]
        table.add_row(full.name, *cells)
    return table


def as_json(
    model: str, rows: Sequence[Operation], pairs: Sequence[tuple[Operation, Operation]]
) -> dict[str, Any]:
    """Both tables."""

    def entry(row: Operation) -> dict[str, Any]:
        return {
            "name": row.name,
            "bytes": row.bytes,
            "operations": row.operations,
            "target": row.target,
            "gpus": {
                gpu.name: {
                    "floor_s": row.floor(gpu),
                    "binds": row.binds(gpu),
                    "target_s": row.target_time(gpu),
                }
                for gpu in GPUS
            },
        }

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "measured": False,
        "model": model,
        "gpus": {g.name: {"operations": g.operations, "bandwidth": g.bandwidth} for g in GPUS},
        "operations": [entry(row) for row in rows],
        "embeddings": [
            {**entry(full), "samples": full.samples, "single_pass": entry(single)}
            for full, single in pairs
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="How fast a GPU lets each operation be, from the model's shape.",
    )
    parser.add_argument("--model", default="2b", help="2b, 3b, 7b or a checkpoint's directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], metavar="ROWS")
    parser.add_argument("--prefix", type=int, nargs="+", default=[300, 1000], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=LATENTS, help="latent steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    if min(options.batch) < 1 or min(options.prefix) < 0 or options.steps < 0:
        parser.error("--batch must be at least 1, --prefix and --steps at least 0")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    try:
        config = load(options.model)
    except CheckpointError as error:
        parser.error(f"--model: {error}")
    rows = list(operations(config, options.batch, options.prefix, options.steps))
    pairs = list(embeddings(config, options.steps))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(operation_table(f"Floors for {options.model}, bfloat16; not measured", rows))
    console.print(embedding_table(pairs))
    if options.json:
        document = as_json(options.model, rows, pairs)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
