"""Builds the emulated kernels and describes their arguments, for tests.

Every source ``kernels_*.cpp`` here offers the kernels of one generation of GPUs as functions of the
same C names.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

Tensor = torch.Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = {path.stem.removeprefix("kernels_"): path for path in sorted(HERE.glob("kernels_*.cpp"))}
HOST_PARTS = {"sm90": [ROOT / "csrc" / "cuda" / "tensor_map.cu"]}
"""Host code that kernels are launched through."""

ELEMENTS = {torch.float16: 1, torch.bfloat16: 2}

_pointer, _i64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Scores(ctypes.Structure):
    _fields_ = [
        ("q", _pointer), ("p", _pointer), ("element", _int),
        ("rows", _i64), ("columns", _i64), ("depth", _i64), ("q_stride", _i64), ("p_stride", _i64),
        ("q_inv", _pointer), ("p_inv", _pointer), ("scale", _pointer),
        ("offset", _i64), ("row_mask", _pointer), ("col_mask", _pointer),
        ("row_group", _pointer), ("col_group", _pointer),
        ("ignore_start", _pointer), ("ignore_col", _pointer),
        ("row_limit", _pointer), ("col_limit", _pointer),
    ]  # fmt: skip


class Forward(ctypes.Structure):
    _fields_ = [
        ("row_lse", _pointer), ("col", _pointer), ("pos", _pointer), ("hard", _pointer),
        ("hard_index", _pointer), ("workspace", _pointer),
    ]  # fmt: skip


class Gradients(ctypes.Structure):
    _fields_ = [
        ("row_lse", _pointer), ("col_lse", _pointer), ("g_row", _pointer), ("g_col", _pointer),
        ("g_pos", _pointer), ("u", _pointer), ("u_stride", _i64),
    ]  # fmt: skip


class Topk(ctypes.Structure):
    _fields_ = [
        ("q", _pointer), ("c", _pointer), ("element", _int),
        ("queries", _i64), ("candidates", _i64), ("depth", _i64),
        ("q_stride", _i64), ("c_stride", _i64), ("q_inv", _pointer), ("c_inv", _pointer),
        ("allowed", _pointer), ("allowed_stride", _i64), ("first", _i64), ("k", _int),
        ("best", _pointer), ("best_stride", _i64), ("splits", _int), ("buffer", _pointer),
        ("keys", _pointer), ("invalid", _pointer),
    ]  # fmt: skip


@functools.cache
def kernels(generation: str) -> ctypes.CDLL:
    """The library of ``sm80`` or ``sm90``, compiled on first use; skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{generation}.so"
        sources = [SOURCES[generation], *HOST_PARTS.get(generation, [])]
        command = [
            compiler, "-DUME_EMULATE", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror",
            "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}",
            f"-I{HERE}", "-x", "c++", *map(str, sources), "-o", str(target),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    for name in ("contrastive_forward", "contrastive_gradient", "similarity_topk"):
        getattr(library, name).restype = ctypes.c_char_p
    sizes = (_i64 * 4)()
    library.structure_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(s) for s in (Scores, Forward, Gradients, Topk)]
    return library


def call(function: ctypes._CFuncPtr, *structures: ctypes.Structure) -> None:
    """Run a kernel; AssertionError with what went wrong."""
    message = function(*(ctypes.byref(s) for s in structures))
    assert message is None, message


def address(t: Tensor | None) -> int | None:
    """Where a tensor starts."""
    return None if t is None else t.data_ptr()


def padded(x: Tensor) -> Tensor:
    """The same values, each row followed by 8 and the matrix by one row of NaN."""
    out = torch.full((x.shape[0] + 1, x.shape[1] + 8), torch.nan, dtype=x.dtype)
    view = out[: x.shape[0], : x.shape[1]]
    view.copy_(x)
    assert view.data_ptr() % 16 == 0
    return view
