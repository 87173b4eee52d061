"""ume_kernels needs torch and numpy and nothing else; ume_models says what it lacks."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Hides the top-level modules named in sys.argv, as if they were not installed.
ALONE = """
import importlib, importlib.util, json, pkgutil, sys

ABSENT = set(json.loads(sys.argv[1]))


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ABSENT
        return None if hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
"""

KERNELS = """
import torch

import ume_kernels
from ume_kernels import dispatch, prefill
from ume_kernels.dispatch import Backend

assert "torch._dynamo" not in sys.modules  # would make the import slow
triton = importlib.util.find_spec("triton")
for module in pkgutil.walk_packages(ume_kernels.__path__, "ume_kernels."):
    last = module.name.split(".")[-1]
    if last == "__main__" or (last.startswith("triton_") and not triton):
        continue
    importlib.import_module(module.name)

torch.manual_seed(0)
shape = ume_kernels.LayerShape(num_heads=4, num_kv_heads=2, head_dim=8, rms_eps=1e-6)
width, inner, rows = 32, 48, 3
x, gate, up = torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, width)


def weight(*size):
    return torch.randn(*size) / size[-1] ** 0.5


def arena():
    return torch.zeros(rows, 2, 16, 8), torch.zeros(rows, 2, 16, 8)


def decode():
    weights = ume_kernels.DecoderLayerWeights(
        weight(width), weight(32, width), None, weight(16, width), None, weight(16, width), None,
        weight(width, 32), weight(width), weight(inner, width), weight(inner, width),
        weight(width, inner),
    )
    rope = ume_kernels.rope_table(16, 1e4 ** -(torch.arange(0, 8, 2) / 8))
    lengths = torch.tensor([0, 2, 5])
    step = ume_kernels.decode_step(lengths, 1, 16, rope, shape, torch.float32)
    keys, values = arena()
    hidden = ume_kernels.decode_layer(x[:, None], step, keys, values, weights, shape)
    assert keys.any() and values.any()
    q, slots = torch.randn(rows, 1, 4, 8), torch.arange(rows)
    return [hidden, ume_kernels.attend_cache(q, keys, values, slots, lengths + 1)]


def moe_transition():
    module = ume_kernels.MoETransition(width)
    z = x.clone().requires_grad_()
    out, aux = module(z, 0)
    (out.sum() + sum(aux.values())).backward()
    return [out, z.grad, *aux.values()]


def contrastive_loss():
    q, p = x.clone().requires_grad_(), gate.clone().requires_grad_()
    loss = ume_kernels.contrastive_loss(q, p) + ume_kernels.distributed_contrastive_loss(q, p)
    loss.backward()
    return [loss, q.grad, p.grad]


def rope_append():
    keys, values = arena()
    q, k, v = torch.randn(rows, 4, 8), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    cos, sin = torch.randn(rows, 8), torch.randn(rows, 8)
    at = torch.arange(rows)
    out = prefill.rope_append(q, k, v, cos, sin, keys, values, at, at)
    assert keys.any() and values.any()
    return [out]


calls = {
    "contrastive_loss": contrastive_loss,
    "decode": decode,
    "linear": lambda: [ume_kernels.linear(x, weight(5, width)),
                       ume_kernels.linear(x.bfloat16(), weight(5, width).bfloat16())],
    "moe_transition": moe_transition,
    "rms_norm": lambda: [prefill.rms_norm(x, weight(width), 1e-6)],
    "rope_append": rope_append,
    "silu_mul": lambda: [prefill.silu_mul(gate, up), prefill.silu_mul_(gate.clone(), up)],
    "similarity_topk": lambda: [ume_kernels.similarity_topk(x, gate, 2)[0]],
}
assert calls.keys() == dispatch.operations().keys()
for name, call in calls.items():
    for result in call():
        assert torch.isfinite(result).all(), name
assert len(ume_kernels.explain()) == len(calls)
print("every operation ran")
"""

MODELS = """
import ume_models
import ume_models.patching
import ume_models.patching.hook
import ume_models.patching.report

assert "torch" not in sys.modules  # a start-up file imports this


def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def accelerate():
    import torch

    ume_models.accelerate(torch.nn.Linear(2, 2))


print(json.dumps({
    "accelerate": told(accelerate),
    "plug points": told(lambda: ume_models.patching.apply("transformers", attention=True)),
    "load": told(lambda: ume_models.load(sys.argv[2])),
}))
"""


def all_but_torch_and_numpy() -> list[str]:
    """Installed top-level modules that neither these, nor Triton, nor what they need provide."""
    closure = runpy.run_path(str(ROOT / "tests" / "compat" / "absent.py"))["closure"]
    kept = closure(("torch", "numpy", "triton"))
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in kept}
    return sorted(
        module
        for module, providers in metadata.packages_distributions().items()
        if not module.startswith("ume_")
        and names.isdisjoint(re.sub(r"[-_.]+", "-", p).lower() for p in providers)
    )


def run_alone(script: str, absent: list[str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE + script, json.dumps(absent), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_rest_really_is_absent() -> None:
    with pytest.raises(AssertionError, match="No module named 'safetensors'"):
        run_alone("import safetensors", all_but_torch_and_numpy())


def test_every_operation_runs_with_torch_and_numpy_alone() -> None:
    assert run_alone(KERNELS, all_but_torch_and_numpy()).strip() == "every operation ran"


def test_models_and_patching_name_what_is_missing(checkpoint_dir: Path) -> None:
    told = json.loads(run_alone(MODELS, all_but_torch_and_numpy(), str(checkpoint_dir)))
    # What is no model is told from one without any of them.
    assert re.search("No module named|Linear is not a model", told.pop("accelerate"))
    for error in told.values():
        assert "No module named" in error


@pytest.mark.skipif(not find_spec("tokenizers"), reason="the other packages are absent, too")
def test_where_only_transformers_is_absent_errors_name_it(checkpoint_dir: Path) -> None:
    told = json.loads(run_alone(MODELS, ["transformers"], str(checkpoint_dir)))
    assert told["accelerate"].startswith("PatchError: Linear is not a model known here")
    assert told["plug points"].startswith("PatchError: transformers is not installed")
    assert told["load"] == "ModuleNotFoundError: No module named 'transformers'"
