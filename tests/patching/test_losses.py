"""The contrastive losses of PLUME's training and of VLM2Vec, replaced: numbers and gradients."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import known_standins  # noqa: F401  (for the processes that this file starts)
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import ume_models.assets
from ume_models.errors import PatchError
from ume_models.patching import adapter, losses, recipes
from ume_models.patching.changes import commit, undo
from ume_models.patching.recipes import Recipe, plan

Tensor = torch.Tensor

STANDINS = Path(__file__).parent / "standins"
OPS = Path(__file__).parents[1] / "conformance" / "plume_tiny" / "ops.safetensors"
TINY = Path(ume_models.assets.__file__).parent / "tiny"
NAME = "_distributed_bidirectional_contrastive_loss"


def recipe_of(module: str) -> Recipe:
    return next(recipe for recipe in losses.RECIPES if recipe.modules[0] == module)


def replaced(module: ModuleType, path: str) -> tuple[Any, Any]:
    """Original and replacement of a target, taken back from the module."""
    recipe = recipe_of(module.__name__)
    assert recipe.recognises(module)
    changes, entries = plan(recipe, module)
    assert entries
    owner, _, leaf = path.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = vars(holder)[leaf]
    commit(changes)
    new = vars(holder)[leaf]
    undo(changes)
    assert vars(holder)[leaf] is original
    assert new is not original
    return original, new


@pytest.fixture(scope="module")
def plume(imported) -> Iterator[ModuleType]:
    with imported(STANDINS / "plume", "plume.train.train_plume") as (module,):
        yield module


@pytest.fixture(scope="module")
def vlm2vec(imported) -> Iterator[ModuleType]:
    with imported(STANDINS / "vlm2vec", "src.loss") as (module,):
        yield module


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that do not reach the original."""
    calls: list[Any] = []
    inner = losses.contrastive_loss

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return inner(*args, **options)

    monkeypatch.setattr(losses, "contrastive_loss", counting)
    tried = recipes.tried

    def uncounted(*args: Any) -> str | None:
        before = len(calls)
        complaint = tried(*args)
        del calls[before:]
        return complaint

    monkeypatch.setattr(recipes, "tried", uncounted)
    return calls


def relative(got: Tensor, wanted: Tensor) -> float:
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    difference = float((got - wanted).abs().max()) if got.numel() else 0.0
    return difference / size if size else difference


def gradients(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    value = loss(x, y)
    value.sum().backward()
    return [value.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, y))]


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert relative(a, b) <= 1e-5


def pairs(n: int, m: int, width: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=generator) for rows in (n, m))
    return x, y


# -- PLUME's training ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["nce0", "nce1", "nce2", "nce3"])
def test_recorded_outputs_of_the_official_loss(case, plume, fused):
    ops = load_file(OPS)
    _, new = replaced(plume, NAME)
    q, p, valid = (ops[f"{case}.{name}"] for name in ("q", "p", "valid"))
    count = float(valid.sum())

    def loss(q: Tensor, p: Tensor) -> Tensor:
        value, *rest = new(q, p, valid, 50.0)
        assert rest == [count, count, None]
        return value

    value, dq, dp = gradients(loss, q, p)
    assert relative(value, ops[f"{case}.loss"][0]) <= 1e-5
    assert relative(dq, ops[f"{case}.dq"]) <= 1e-5
    assert relative(dp, ops[f"{case}.dp"]) <= 1e-5
    assert len(fused) == 1


@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("rows", [5, 0])
def test_every_branch_returns_what_the_original_returns(valid, rows, plume):
    original, new = replaced(plume, NAME)
    x, y = pairs(rows, rows)
    mask = torch.tensor(valid[:rows], dtype=torch.bool)
    for options in ({}, {"cross_device": False}, {"local_loss": False}):
        rest: list[Any] = []

        def loss(x: Tensor, y: Tensor, run: Any, rest: Any = rest, options: Any = options) -> Any:
            value, *others = run(x, y, mask, 20.0, **options)
            rest.append(others)
            return value

        same(
            gradients(lambda x, y, loss=loss: loss(x, y, new), x, y),
            gradients(lambda x, y, loss=loss: loss(x, y, original), x, y),
        )
        assert rest[0] == rest[1]


def test_debug_statistics_are_the_originals(plume, fused):
    original, new = replaced(plume, NAME)
    x, y = pairs(4, 4)
    valid = torch.ones(4, dtype=torch.bool)
    assert new(x, y, valid, 50.0, return_debug_stats=True) == original(
        x, y, valid, 50.0, return_debug_stats=True
    )
    assert not fused


def test_what_invalid_rows_hold_does_not_reach_the_gradient(plume):
    _, new = replaced(plume, NAME)
    x, y = pairs(4, 4)
    x[1] = torch.nan
    valid = torch.tensor([True, False, True, True])
    value, dx, dy = gradients(lambda x, y: new(x, y, valid, 50.0)[0], x, y)
    assert all(bool(torch.isfinite(t).all()) for t in (value, dx, dy))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_close_to_float32(autocast, plume, fused):
    original, new = replaced(plume, NAME)
    x, y = pairs(40, 40, 64)
    y = y + x / 2
    valid = torch.ones(40, dtype=torch.bool)
    kind = torch.float32 if autocast else torch.bfloat16
    exact = gradients(lambda x, y: original(x.double(), y.double(), valid, 20.0)[0], x, y)
    errors, dtypes = [], []
    for run in (original, new):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(
                lambda x, y, run=run: run(x, y, valid, 20.0)[0], x.to(kind), y.to(kind)
            )
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
        dtypes.append([t.dtype for t in found])
    assert dtypes[0] == dtypes[1]
    for before, after in zip(*errors, strict=True):
        # one number, the loss, may happen to be right to the last bit
        assert after <= 2 * max(before, 2**-9)
    assert len(fused) == 1


@pytest.mark.compat
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_losses_of_a_repaired_original(attention, checkpointing, imported):
    names = ["plume.train.train_plume", "plume.train.latent_moe", "plume.train.train_plume_gc"]
    with imported(STANDINS / "plume", *names) as (module, adapter_module, gc_module):
        kind = gc_module.PlumeGradientCheckpointTrainer if checkpointing else module.PlumeTrainer
        data = [module.make_plume_data_module(None, None)["train_dataset"][i] for i in range(3)]

        def step(patched: bool) -> tuple[Tensor, dict[str, Tensor]]:
            changes = []
            if patched:
                mine = next(r for r in adapter.RECIPES if r.name == "plume-train")
                for recipe, where in ((recipe_of(names[0]), module), (mine, adapter_module)):
                    changes += plan(recipe, where)[0]
            commit(changes)
            try:
                model = module.load_model(TINY, attention)
                trainer = kind(model)
                loss = trainer.compute_loss(model, data)
                loss.backward()
            finally:
                undo(changes)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return loss.detach(), grads

        # The original with the mask that its authors meant, one of the whole length.
        wanted, wanted_grads = repaired(module, lambda: step(False))
        got, got_grads = step(True)
    assert relative(got, wanted) <= 1e-5
    assert got_grads.keys() == wanted_grads.keys()
    for name, value in wanted_grads.items():
        assert relative(got_grads[name], value) <= 1e-4, name


def repaired(module: ModuleType, run: Callable[[], Any]) -> Any:
    inner = module._get_backbone_model

    def backbone(model: Any) -> Any:
        decoder = inner(model)

        def call(**kwargs: Any) -> Any:
            kwargs["attention_mask"] = None
            return decoder(**kwargs)

        return call

    module._get_backbone_model = backbone
    try:
        return run()
    finally:
        module._get_backbone_model = inner


@pytest.mark.parametrize("script", ["train_plume.py", "train_plume_gc.py"])
def test_unmodified_training_scripts(script, tmp_path, imported, run_script):
    report = tmp_path / "losses.json"
    path = STANDINS / "plume" / "plume" / "train" / script
    done = run_script(path, str(TINY), str(report), accelerate="1")
    assert "1 repaired" in done.stderr
    with imported(STANDINS / "plume", "plume.train.train_plume") as (module,):
        model = module.load_model(TINY)
        arguments = module.TrainingArguments()
        wanted = repaired(module, lambda: module.train(model, arguments))
    got = json.loads(report.read_text())
    assert relative(torch.tensor(got), torch.tensor(wanted)) <= 1e-4


# -- VLM2Vec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 8), (3, 11), (1, 5), (1, 1)])
def test_simple_loss_of_one_or_several_targets_per_query(n, m, reduction, vlm2vec, fused):
    original, new = replaced(vlm2vec, "SimpleContrastiveLoss.__call__")
    loss = vlm2vec.SimpleContrastiveLoss(temperature=0.3)
    x, y = pairs(n, m)
    same(
        gradients(lambda x, y: new(loss, x, y, reduction=reduction), x, y),
        gradients(lambda x, y: original(loss, x, y, reduction=reduction), x, y),
    )
    assert len(fused) == 1


def test_explicit_targets_are_the_originals(vlm2vec, fused):
    original, new = replaced(vlm2vec, "SimpleContrastiveLoss.__call__")
    loss = vlm2vec.SimpleContrastiveLoss()
    x, y = pairs(3, 5)
    target = torch.tensor([4, 0, 2])
    assert torch.equal(new(loss, x, y, target), original(loss, x, y, target))
    assert not fused


@pytest.mark.parametrize(
    ("x", "y", "temperature"),
    [
        ((4, 24), (2, 24), 0.1),
        ((0, 24), (2, 24), 0.1),
        ((2, 24), (2, 23), 0.1),
        ((2, 24), (2, 24), 0.0),
        ((2, 24), (2, 24), -1.0),
    ],
)
def test_what_does_not_fit_is_the_originals(x, y, temperature, vlm2vec, fused):
    original, new = replaced(vlm2vec, "SimpleContrastiveLoss.__call__")
    loss = vlm2vec.SimpleContrastiveLoss(temperature)
    x, y = torch.randn(x), torch.randn(y)
    results = []
    for run in (original, new):
        try:
            results.append(str(run(loss, x, y)))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    assert results[0] == results[1]
    assert not fused


def test_the_losses_that_stay_are_told():
    told = {entry.target: entry for recipe in losses.RECIPES for entry in recipe.left_alone}
    assert "src.grad_cache.loss.SimpleContrastiveLoss" in told
    assert all(entry.reason for entry in told.values())


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)
        )

    def forward(self, qry: Any = None, tgt: Any = None) -> dict[str, Any]:
        reps = self.layers((tgt if qry is None else qry)["input_ids"])
        return {
            "qry_reps": None if qry is None else reps,
            "tgt_reps": reps if qry is None else None,
        }


@pytest.mark.parametrize("chunk", [2, 3, 7])
def test_gradient_cache_equals_the_full_batch(chunk, fused, imported):
    names = ["src.loss", "src.grad_cache.grad_cache", "src.data.collator.train_collator"]
    with imported(STANDINS / "vlm2vec", *names) as (module, cache_module, collator):
        original, new = replaced(module, "SimpleContrastiveLoss.__call__")
        loss = module.SimpleContrastiveLoss(temperature=0.2)
        x, y = pairs(7, 14, 8)
        full = Encoder()
        wanted = original(loss, full.layers(x), full.layers(y))
        wanted.backward()
        cached = Encoder()
        step = cache_module.GradCache(
            models=[cached, cached],
            chunk_sizes=chunk,
            loss_fn=lambda a, b: new(loss, a, b),
            split_input_fn=collator.split_and_process_vlm_inputs,
            get_rep_fn=collator.get_dense_rep,
        )
        got = step({"qry": {"input_ids": x}}, {"tgt": {"input_ids": y}})
    assert relative(got, wanted.detach()) <= 1e-5
    for mine, other in zip(cached.parameters(), full.parameters(), strict=True):
        assert relative(mine.grad, other.grad) <= 1e-5
    assert len(fused) == 1


# -- versions that compute something else ------------------------------------------------------


def fork(name: str, old: str, new: str) -> ModuleType:
    """A stand-in whose loss is another one."""
    folder = "plume" if name.startswith("plume") else "vlm2vec"
    path = STANDINS / folder / f"{name.replace('.', '/')}.py"
    source = path.read_text()
    assert old in source
    module = ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source.replace(old, new), name, "exec"), vars(module))
    return module


PRODUCT = "logits = torch.matmul(x, y.transpose(0, 1))"
DIVISION = "logits / self.temperature"
SMOOTHED = "reduction=reduction, label_smoothing=0.01"
GATHERED = "dist.is_initialized() and dist.all_reduce(x); " + PRODUCT


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (PRODUCT, "logits = F.normalize(x) @ F.normalize(y).T", "something else.*difference"),
        (DIVISION, "logits * self.temperature", "something else.*difference"),
        (DIVISION, "logits / 0.02", "something else.*difference"),
        (DIVISION, "logits * self.log_scale.exp()", "cannot be tried.*log_scale"),
        ("reduction=reduction", SMOOTHED, "something else.*difference"),
        ("step = y.size(0) // x.size(0)", "step = 1", "something else.*difference"),
    ],
)
def test_another_simple_loss_is_not_replaced(old, new, complaint):
    module = fork("src.loss", old, new)
    original = vars(module.SimpleContrastiveLoss)["__call__"]
    not_replaced(module, "src.loss.SimpleContrastiveLoss.__call__", complaint)
    assert vars(module.SimpleContrastiveLoss)["__call__"] is original


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("F.normalize(reps, p=2, dim=-1)", "reps", "something else.*difference"),
        ("masked_fill(~all_valid[None], -1e4)", "mul(1)", "something else.*difference"),
        ("cross_entropy(p2q[anchors]", "cross_entropy(q2p[anchors]", "something else.*difference"),
        ("float(valid_mask.sum())", "valid_mask.sum()", "returns a Tensor, expected a float"),
    ],
)
def test_another_training_loss_is_not_replaced(old, new, complaint, imported):
    with imported(STANDINS / "plume", "plume.train.train_plume"):
        module = fork("plume.train.train_plume", old, new)
    original = vars(module)[NAME]
    not_replaced(module, f"plume.train.train_plume.{NAME}", complaint)
    assert vars(module)[NAME] is original


def not_replaced(module: ModuleType, target: str, complaint: str) -> None:
    recipe = recipe_of(module.__name__)
    assert recipe.recognises(module)
    with pytest.raises(PatchError, match=complaint):
        plan(recipe, module)
    changes, entries = plan(recipe, module, strict=False)
    assert target not in [change.entry.target for change in changes]
    assert [e.action for e in entries if e.target == target] == ["left alone"]


def test_trials_do_not_depend_on_what_is_set(vlm2vec, plume):
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    try:
        for module in (vlm2vec, plume):
            with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
                assert plan(recipe_of(module.__name__), module)[0]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), state)


# -- two processes ------------------------------------------------------------------------------


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        sys.path[:0] = [str(STANDINS / "plume"), str(STANDINS / "vlm2vec")]
        module = importlib.import_module("plume.train.train_plume")
        original, new = replaced(module, NAME)
        recorded_across_ranks(new, rank)
        counts_across_ranks(original, new, rank)
        one_rank_has_nothing(new, rank)
        distributed_loss(importlib.import_module("src.loss"), rank)
        one_rank_tries(rank)
    finally:
        dist.destroy_process_group()


def test_across_processes(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path)), 2)


def recorded_across_ranks(new: Any, rank: int) -> None:
    ops = load_file(OPS)
    for case, local in (("nce_dist0", True), ("nce_dist1", False)):
        q, p, valid = (ops[f"{case}.{name}"] for name in ("q", "p", "valid"))
        rows = slice(rank * len(q) // 2, (rank + 1) * len(q) // 2)
        mine = valid[rows]

        def loss(
            q: Tensor, p: Tensor, local: Any = local, mine: Any = mine, all_: Any = valid
        ) -> Any:
            value, *rest = new(q, p, mine, 50.0, local_loss=local)
            assert rest == [float(mine.sum()), float(all_.sum()), None]
            return value

        value, dq, dp = gradients(loss, q[rows], p[rows])
        assert relative(value, ops[f"{case}.loss_per_rank"][rank]) <= 1e-5
        assert relative(dq, ops[f"{case}.dq"][rows]) <= 1e-5
        assert relative(dp, ops[f"{case}.dp"][rows]) <= 1e-5


def counts_across_ranks(original: Any, new: Any, rank: int) -> None:
    x, y = pairs(6, 6, seed=7)
    x, y = x[3 * rank : 3 * rank + 3], y[3 * rank : 3 * rank + 3]
    valid = torch.tensor([True, rank == 0, True])
    for options in ({}, {"local_loss": False}, {"cross_device": False}):
        rest: list[Any] = []

        def loss(x: Tensor, y: Tensor, run: Any, rest: Any = rest, options: Any = options) -> Any:
            value, *others = run(x, y, valid, 50.0, **options)
            rest.append(others)
            return value

        same(
            gradients(lambda x, y, loss=loss: loss(x, y, new), x, y),
            gradients(lambda x, y, loss=loss: loss(x, y, original), x, y),
        )
        assert rest[0] == rest[1]
    nothing = torch.zeros(3, dtype=torch.bool)
    value, *others = new(x.requires_grad_(), y, nothing, 50.0)
    value.backward()
    assert float(value) == 0
    assert others == [0.0, 0.0, None]
    assert not x.grad.any()


def one_rank_has_nothing(new: Any, rank: int) -> None:
    """The original leaves the other rank waiting in the backward."""
    x, y = pairs(2, 2, seed=rank)
    valid = torch.full((2,), rank == 0)
    rest: list[Any] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value, *others = new(x, y, valid, 50.0)
        rest.extend(others)
        return value

    value, dx, _ = gradients(loss, x, y)
    assert rest == [2.0 if rank == 0 else 0.0, 2.0, None]
    assert (float(value) > 0) == (rank == 0)
    assert bool(dx.any()) == (rank == 0)


def distributed_loss(module: ModuleType, rank: int) -> None:
    x, y = pairs(3, 6, seed=3 + rank)
    loss = module.DistributedContrastiveLoss(temperature=0.1)
    wanted = gradients(loss, x, y)
    changes, _ = plan(recipe_of("src.loss"), module)
    commit(changes)
    same(gradients(loss, x, y), wanted)
    undo(changes)


def one_rank_tries(rank: int) -> None:
    """A trial waits for nobody, and what would is not replaced."""
    if rank:
        for name, old, new in (
            ("src.loss", PRODUCT, GATHERED),
            ("plume.train.train_plume", "zero = qry", "dist.barrier(); zero = qry"),
        ):
            with pytest.raises(PatchError, match=r"cannot be tried \(RuntimeError: it calls c10d"):
                plan(recipe_of(name), fork(name, old, new))
    dist.barrier()
