"""What the device itself gives: copy and read bandwidth, and the rate of a large product."""

from __future__ import annotations

import torch

from benchmarks.gpu.figures import Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import measure


def run(sizes: Sizes, record: Recorder) -> None:
    """Measure the ceilings on random data; zeros would run faster."""
    device = sizes.device
    source = torch.empty(sizes.copy_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, seconds=sizes.seconds)
    rate = 2 * source.nbytes / timing.median
    record.rate("copy bandwidth", rate, "B/s", timing, bytes=2 * source.nbytes)
    timing = measure(source.sum, device, seconds=sizes.seconds)
    record.rate("read bandwidth", source.nbytes / timing.median, "B/s", timing)
    n = sizes.gemm
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(sizes.dtype).unbind(0)
    timing = measure(lambda: a @ b, device, seconds=sizes.seconds)
    record.rate("matrix product", 2 * n**3 / timing.median, "FLOP/s", timing, side=n)
