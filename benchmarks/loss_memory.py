"""Extra peak memory of one forward and backward of a loss, in a process of its own.

python -m benchmarks.loss_memory "materialised PyTorch" 8192 1536 float32 2
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.similarity_engines import pairs, step


def extra_bytes(loss: str, count: int, width: int, dtype: str, threads: int) -> int:
    """Bytes above the inputs at the highest point, gradients included, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss_memory", loss, str(count), str(width), dtype]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [*command, str(threads)], cwd=root, capture_output=True, text=True, check=True
    )
    return int(json.loads(result.stdout)["extra_bytes"])


def main() -> None:
    """Measure in this process and print."""
    if len(sys.argv) != 6:
        raise SystemExit("usage: python -m benchmarks.loss_memory LOSS COUNT WIDTH DTYPE THREADS")
    loss, count, width, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    kind = getattr(torch, dtype)
    # Libraries keep code and buffers from their first use on.
    step(loss, *pairs(64, int(width), kind))
    q, p = pairs(int(count), int(width), kind)
    reset_peak_memory()
    before = peak_memory()
    step(loss, q, p)
    print(json.dumps({"extra_bytes": peak_memory() - before}))


if __name__ == "__main__":
    main()
