"""What needs a GPU. Without one these tests skip; ``UME_GPU_DRY_RUN=1`` tries them on a CPU.

A dry run takes tiny sizes, float32 and Triton's interpreter: it shows that the tests themselves
run, and proves nothing about a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# The models and layers of the benchmarks; plain `pytest` leaves the root out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DRY_RUN = os.environ.get("UME_GPU_DRY_RUN", "0") not in ("", "0")
REASON = "needs a CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None and not (DRY_RUN and marker.kwargs.get("dry", False)):
            item.add_marker(pytest.mark.skip(reason=REASON))


@dataclass(frozen=True)
class Parity:
    """An error bound relative to the eager path of the same type."""

    def check(
        self,
        got: torch.Tensor,
        eager: torch.Tensor,
        truth: torch.Tensor,
        what: str = "result",
    ) -> None:
        """``‖got - truth‖ ≤ 2 ‖eager - truth‖``, and the same for the largest deviation.

        Two allowances: a millionth of the size, since in float32 both are near the truth and
        differ by rounding order; and for a single deviation, or where there are too few numbers
        for their norm to mean anything, one rounding of the type (a few in float32).
        """
        assert got.dtype == eager.dtype, what
        assert got.shape == truth.shape, what
        wide = truth.double()
        mine, theirs = got.double() - wide, eager.double() - wide
        assert bool(torch.isfinite(got).all()), f"{what} is not finite"
        size = float(wide.norm())
        assert size > 0, f"{what}: the truth is zero, so the test proves nothing"
        rounding = max(torch.finfo(got.dtype).eps, 4e-6)
        slack = 1e-6 if truth.numel() >= 64 else rounding
        assert float(mine.norm()) <= 2 * float(theirs.norm()) + slack * size, (
            f"{what}: error {float(mine.norm() / size):.2e}, "
            f"the eager path's {float(theirs.norm() / size):.2e}"
        )
        largest = float(wide.abs().max())
        assert float(mine.abs().max()) <= 2 * float(theirs.abs().max()) + rounding * largest, (
            f"{what}: largest deviation {float(mine.abs().max()):.2e}, "
            f"the eager path's {float(theirs.abs().max()):.2e}"
        )


@pytest.fixture(scope="session")
def parity() -> Parity:
    return Parity()


@pytest.fixture(scope="session")
def dry_run() -> bool:
    return not torch.cuda.is_available()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest, dry_run: bool) -> torch.dtype:
    if dry_run:  # the interpreter computes bfloat16 wrongly
        return torch.float32 if request.param == "bfloat16" else torch.float16
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def exact_float32(dry_run: bool) -> Iterator[None]:
    """The truth of these tests is float32 arithmetic: no TF32 in products or convolutions."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution
