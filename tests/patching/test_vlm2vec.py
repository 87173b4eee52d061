"""VLM2Vec's MMEBModel, class and instance patched, against itself: numbers, gradients, files."""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import known_standins  # noqa: F401  (for the processes that this file starts)
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import ume_models.assets
from ume_models.patching import vlm2vec
from ume_models.patching.changes import commit, undo
from ume_models.patching.recipes import plan
from ume_models.patching.vlm2vec import plan_instance, pooled_columns

Tensor = torch.Tensor

STANDIN = Path(__file__).parent / "standins" / "vlm2vec"
TINY = Path(ume_models.assets.__file__).parent / "tiny"
MODULES = ("src.model.model", "src.model.processor", "src.loss")
RECIPE = vlm2vec.RECIPES[0]


def bundled(folder: Path) -> Path:
    """The layout that PLUME bundles: ``src/utils.py`` instead of a package."""
    shutil.copytree(STANDIN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src/utils/eval_utils").rename(folder / "src/eval_utils")
    (folder / "src/utils/basic_utils.py").rename(folder / "src/basic_utils.py")
    shutil.rmtree(folder / "src/utils")
    (folder / "src/basic_utils.py").rename(folder / "src/utils.py")
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        text = text.replace("src.utils.basic_utils", "src.utils")
        file.write_text(text.replace("src.utils.eval_utils", "src.eval_utils"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["upstream", "bundled"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "upstream":
        return STANDIN
    return bundled(tmp_path_factory.mktemp("layout") / "VLM2Vec")


@pytest.fixture
def repository(imported: Any) -> Iterator[SimpleNamespace]:
    with imported(STANDIN, *MODULES) as modules:
        yield SimpleNamespace(model=modules[0], processor=modules[1], loss=modules[2])


@contextmanager
def patched(module: ModuleType) -> Iterator[None]:
    assert RECIPE.recognises(module)
    changes, _ = plan(RECIPE, module)
    commit(changes)
    try:
        yield
    finally:
        undo(changes)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way every encoding went."""
    taken: list[str] = []

    def watch(name: str) -> None:
        inner = getattr(vlm2vec, name)

        def watched(*args: Any) -> Any:
            found = inner(*args)
            if found is not None:
                taken.append(name)
            return found

        monkeypatch.setattr(vlm2vec, name, watched)

    watch("_packed")
    watch("_without_head")
    return taken


def build(repository: Any, **options: Any) -> nn.Module:
    encoder = repository.processor.backbone2model["qwen2_vl"].from_pretrained(TINY)
    model = repository.model.MMEBModel(encoder, **options)
    model.model_backbone = "qwen2_vl"
    model.encoder.rope_deltas = 0  # the first call's positions are another kind; see below
    return model.eval()


TEXTS = ("a dog", "what is this", "one two three four five six", "x", "the red boat at sea")
VISUALS = (None, (1, 4, 4), None, (1, 2, 6), (2, 2, 4))


def batch(repository: Any, side: str = "left", shift: int = 0) -> dict[str, Any]:
    processor = repository.processor.Qwen2VLProcessor()
    processor.padding_side = side
    visuals = [*VISUALS[shift:], *VISUALS[:shift]]
    given = {"text": list(TEXTS), "images": visuals}
    return repository.processor.Qwen2_VL_process_fn(given, processor)


def relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


# -- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_of_both_layouts(layout, side, normalize, imported, paths):
    with imported(layout, *MODULES) as (module, processor, _):
        repository = SimpleNamespace(model=module, processor=processor)
        model, other = (build(repository, normalize=normalize) for _ in range(2))
        model.encoder.rope_deltas = other.encoder.rope_deltas = None
        batches = [batch(repository, side, shift) for shift in range(3)]
        with torch.no_grad():
            # the first call computes positions otherwise than those after it
            wanted = [model(qry=x)["qry_reps"] for x in batches]
            with patched(module):
                got = [other(tgt=x) for x in batches]
    for a, b in zip(got, wanted, strict=True):
        assert a["qry_reps"] is None
        assert a["tgt_reps"].dtype is b.dtype
        assert relative(a["tgt_reps"], b) <= 1e-5
    assert paths == ["_packed"] * 3
    assert (model.encoder.rope_deltas == other.encoder.rope_deltas).all()
    assert "forward" not in vars(other.encoder.model)


def test_half_precision_is_as_close_to_float32(repository, paths):
    exact = build(repository)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    x = batch(repository)
    with torch.no_grad():
        wanted, before = exact(qry=x)["qry_reps"], model(qry=x)["qry_reps"]
        with patched(repository.model):
            after = model(qry=x)["qry_reps"]
    assert after.dtype is torch.bfloat16
    errors = [float((got.float() - wanted).norm()) for got in (before, after)]
    assert 0 < errors[1] <= 2 * errors[0]
    assert paths == ["_packed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype, repository, paths):
    model = build(repository, normalize=True).to(dtype)
    x = batch(repository)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(qry=x)["qry_reps"]
        with patched(repository.model):
            got = model(qry=x)["qry_reps"]
    assert got.dtype is wanted.dtype
    # float32 weights and bfloat16 products: as the encoder does it
    assert paths == ["_packed" if dtype is torch.bfloat16 else "_without_head"]
    assert relative(got, wanted) <= (3e-2 if dtype is torch.bfloat16 else 0)


def test_pooled_columns_are_the_official_ones():
    def official(mask: Tensor) -> Tensor:
        if mask[:, -1].sum() == mask.shape[0]:
            return torch.full((len(mask),), mask.shape[1] - 1)
        return mask.sum(dim=1) - 1

    for rows in (
        [[0, 1, 1], [1, 1, 1]],
        [[1, 1, 0], [1, 1, 1]],
        [[1, 1, 1], [1, 1, 1]],
        [[1, 0, 0]],
        [[0, 0, 1]],
        [[0, 1, 1], [1, 1, 0]],  # not its last token
    ):
        mask = torch.tensor(rows)
        found = pooled_columns(mask.numpy() != 0)
        assert found is not None
        assert found.tolist() == official(mask).tolist()
    for rows in (
        [[1, 0, 1], [1, 1, 1]],  # with a hole
        [[0, 0, 1], [1, 1, 0]],  # both sides: the official one reads padding
        [[0, 0, 0], [1, 1, 1]],
        [[0, 1, 0]],
    ):
        assert pooled_columns(np.array(rows) != 0) is None


def test_padding_on_both_sides_is_the_encoders(repository, paths):
    model = build(repository)
    x = batch(repository)
    x = {"input_ids": x["input_ids"][:3, -3:], "attention_mask": torch.ones(3, 3).long()}
    x["attention_mask"][0, :2] = x["attention_mask"][1, 2] = 0
    x["input_ids"] = x["input_ids"].clamp(max=600)
    with torch.no_grad():
        wanted = model(qry=x)["qry_reps"]
        with patched(repository.model):
            assert torch.equal(model(qry=x)["qry_reps"], wanted)
    assert paths == ["_without_head"]


# -- gradients ----------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """A layer as PEFT wraps it, with its names."""

    merged = disable_adapters = False

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.dropout = nn.Dropout(0.5)
        self.lora_A = nn.Parameter(torch.randn(4, layer.in_features) / 10)
        self.lora_B = nn.Parameter(torch.randn(layer.out_features, 4) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.dropout(x) @ self.lora_A.T @ self.lora_B.T


BaseTunerLayer = type("BaseTunerLayer", (), {})
Lora = type("Linear", (LoraLinear, BaseTunerLayer), {})


class BaseTuner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = BaseTuner(model)
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.encoder.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    model.encoder = PeftModel(model.encoder)
    return model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients(training, lora, side, repository, paths):
    model = build(repository, normalize=True, temperature=0.5)
    model = (with_lora(model) if lora else model).train(training)
    x, y = batch(repository, side), batch(repository, side, 2)
    torch.manual_seed(9)
    wanted, wanted_grads = gradients(model, qry=x, tgt=y)
    other = copy.deepcopy(model)
    with patched(repository.model):
        torch.manual_seed(9)
        got, grads = gradients(other, x, y)
    assert got.dtype is wanted.dtype
    assert relative(got, wanted) <= 1e-5
    assert grads.keys() == wanted_grads.keys()
    for name, value in wanted_grads.items():
        assert relative(grads[name], value) <= 1e-5, name
    assert paths == ["_without_head"] * 2


def test_a_lora_that_is_not_merged_keeps_its_part(repository, paths):
    model = with_lora(build(repository))
    x = batch(repository)
    with torch.no_grad():
        wanted = model(qry=x)["qry_reps"]
        with patched(repository.model):
            assert torch.equal(model(qry=x)["qry_reps"], wanted)
    assert paths == ["_without_head"]


def test_no_logits_and_no_states_of_layers(repository, monkeypatch):
    model = build(repository)
    seen: list[Any] = []
    inner = type(model.encoder).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inner(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(type(model.encoder), "forward", watched)
    with patched(repository.model):
        model(qry=batch(repository))
    (output,) = seen
    assert output.logits.shape[-1] == 0
    assert output.hidden_states is None


def test_loss_of_other_numbers_of_targets_is_the_originals(repository):
    model = build(repository, temperature=3.0)
    x, y = batch(repository), batch(repository, shift=1)
    few = {key: value[:2] for key, value in x.items()}
    wanted = model(few, y).detach()  # every target is the first: as it is there
    with pytest.raises(IndexError):
        model(y, few)
    with patched(repository.model):
        assert relative(model(few, y).detach(), wanted) <= 1e-5
        with pytest.raises(IndexError):
            model(y, few)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_cache(lora, imported, paths):
    names = [*MODULES, "src.grad_cache.grad_cache", "src.data.collator.train_collator"]
    with imported(STANDIN, *names) as (module, processor, loss, cache, collator):
        repository = SimpleNamespace(model=module, processor=processor)
        model = build(repository, normalize=True)
        model = (with_lora(model) if lora else model).train()
        x, y = ({side: batch(repository, shift=i)} for i, side in enumerate(("qry", "tgt")))
        step = cache.GradCache(
            models=[model, model],
            chunk_sizes=2,
            loss_fn=loss.SimpleContrastiveLoss(temperature=0.5),
            split_input_fn=collator.split_and_process_vlm_inputs,
            get_rep_fn=collator.get_dense_rep,
        )
        results = []
        for accelerated in (False, True):
            model.zero_grad()
            torch.manual_seed(8)  # for the dropout of the LoRA
            with patched(module) if accelerated else torch.enable_grad():
                value = step(x, y)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((value, grads))
    (wanted, wanted_grads), (got, got_grads) = results
    assert relative(got, wanted) <= 1e-5
    assert got_grads.keys() == wanted_grads.keys()
    for name, value in wanted_grads.items():
        assert relative(got_grads[name], value) <= 1e-5, name
    # the first pass has no gradients; with dropout it must draw what the second one draws
    assert paths == ["_without_head" if lora else "_packed"] * 6 + ["_without_head"] * 6


# -- where the original runs --------------------------------------------------------------------


def other_backbone(model: Any) -> None:
    model.model_backbone = "internvl"


def unknown_pooling(model: Any) -> None:
    model._pooling = lambda states, mask: states.mean(1)


@pytest.mark.parametrize("change", [other_backbone, unknown_pooling])
def test_what_is_not_known_is_the_originals(change, repository, paths):
    model = build(repository)
    change(model)
    x = batch(repository)
    with torch.no_grad():
        wanted = model(qry=x)["qry_reps"]
        with patched(repository.model):
            assert relative(model(qry=x)["qry_reps"], wanted) <= 1e-6
    assert not paths


def test_hooks_are_called(repository, paths):
    model = build(repository)
    calls: list[int] = []
    model.encoder.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), patched(repository.model):
        model(qry=batch(repository))
    assert calls == [1]
    assert paths == ["_without_head"]


def test_what_raises_raises_the_same_and_leaves_nothing_behind(repository):
    model = build(repository)
    x = batch(repository)
    x["image_grid_thw"] = [np.array([[1, 8, 8]]), *x["image_grid_thw"][1:]]
    x["pixel_values"] = [np.zeros((64, 1176), np.float32), *x["pixel_values"][1:]]
    with torch.no_grad():
        with pytest.raises(ValueError, match="do not match") as wanted:
            model(qry=x)
        with patched(repository.model), pytest.raises(ValueError, match="do not match") as got:
            model(qry=x)
    assert str(got.value) == str(wanted.value)
    assert all("forward" not in vars(module) for module in model.modules())


def test_pooling_that_does_not_exist(repository):
    model = build(repository, pooling="mean")
    with patched(repository.model), pytest.raises(NotImplementedError):
        model(qry=batch(repository))


# -- instances ----------------------------------------------------------------------------------


def test_one_instance(repository, paths):
    model, other = build(repository), build(repository)
    keys = list(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    changes, _ = plan_instance(model)
    assert [change.name for change in changes] == ["encode_input", "forward"]
    commit(changes)
    assert plan_instance(model) == ([], [])
    x, y = batch(repository), batch(repository, shift=3)
    with torch.no_grad():
        assert relative(model(qry=x)["qry_reps"], other(qry=x)["qry_reps"]) <= 1e-5
        assert relative(model.encode_input(y), other.encode_input(y)) <= 1e-5
    assert paths == ["_packed"] * 2
    assert relative(model(x, y), other(x, y)) <= 1e-5
    assert paths[2:] == ["_without_head"] * 2
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.forward.module is copied
        assert copied.encode_input.module is copied
        with torch.no_grad():
            copied.encoder.model.norm.weight.mul_(3)
            assert relative(copied.encode_input(x), 3 * other.encode_input(x)) <= 1e-5
    undo(changes)
    assert not {"forward", "encode_input"} & set(vars(model))


def test_weights_that_change_are_used(repository):
    model, other = build(repository), build(repository)
    x = batch(repository)
    with torch.no_grad(), patched(repository.model):
        model(qry=x)
        for chosen in (model, other):
            chosen.encoder.model.layers[0].mlp.down_proj.weight.mul_(1.5)
            chosen.encoder.visual.merger.mlp[2].bias.add_(1)
        got = model(qry=x)["qry_reps"]
    with torch.no_grad():
        assert relative(got, other(qry=x)["qry_reps"]) <= 1e-5


def test_class_and_instance_are_patched_once(repository):
    model = build(repository)
    with patched(repository.model):
        assert plan_instance(model) == ([], [])
        again, entries = plan(RECIPE, repository.model)
        assert again == []
        assert {entry.action for entry in entries} == {"left alone"}


def test_revert_restores_the_identical_functions(repository):
    kind = repository.model.MMEBModel
    before = dict(vars(kind))
    with patched(repository.model):
        assert kind.forward is not before["forward"]
        assert kind.encode_input is not before["encode_input"]
    assert dict(vars(kind)) == before


# -- transformers' own class --------------------------------------------------------------------


def transformers_batch(kind: type, left: bool) -> dict[str, Any]:
    """Prompts with ``<|vision_start|>``, in the layout of transformers' processor."""
    generator = torch.Generator().manual_seed(4)
    rows = [[5, 9, 33], [4, 725, *[727] * 4, 726, 8, 11], [7] * 6]
    longest = max(map(len, rows))
    pads = [[720] * (longest - len(row)) for row in rows]
    both = [(p, r) if left else (r, p) for p, r in zip(pads, rows, strict=True)]
    keep = [(([0] * len(p)), [1] * len(r)) for p, r in zip(pads, rows, strict=True)]
    ids = torch.tensor([a + b for a, b in both])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([a + b if left else b + a for a, b in keep]),
        "pixel_values": torch.randn(16, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if hasattr(kind, "model") or "mm_token_type_ids" in parameters(kind):
        inputs["mm_token_type_ids"] = (ids == 727).int()
    return inputs


def parameters(kind: type) -> Any:
    import inspect

    return inspect.signature(kind.forward).parameters


@pytest.mark.compat
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
def test_transformers_own_encoder(attention, left, repository, paths):
    import transformers

    kind = transformers.Qwen2VLForConditionalGeneration
    encoder = kind.from_pretrained(TINY, attn_implementation=attention).float()
    model = repository.model.MMEBModel(encoder, normalize=True).eval()
    x = transformers_batch(kind, left)
    with torch.no_grad():
        wanted = [model(qry=x)["qry_reps"] for _ in range(2)]
        with patched(repository.model):
            got = [model(qry=x)["qry_reps"] for _ in range(2)]
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) <= 1e-5
    assert paths == ["_packed"] * 2
    loss, grads = gradients(model, x, x)
    with patched(repository.model):
        other_loss, other_grads = gradients(model, x, x)
    assert relative(other_loss, loss) <= 1e-5
    assert grads.keys() == other_grads.keys()
    for name, value in grads.items():  # of 1e-10 where the loss is nearly zero
        assert relative(other_grads[name], value) <= 1e-4, name
    assert paths[2:] == ["_without_head"] * 2


# -- the script ---------------------------------------------------------------------------------


def test_the_evaluation_script_writes_the_same_files(layout, tmp_path, run_script):
    results = []
    for number, accelerate in enumerate((None, "1")):
        out = tmp_path / str(number)
        done = run_script(layout / "eval.py", str(TINY), str(out), accelerate=accelerate)
        results.append((out, done.stderr))
    assert "encode_input" not in results[0][1]
    assert "ume: src.model.model" in results[1][1]
    files = [sorted(p.name for p in out.iterdir()) for out, _ in results]
    assert files[0] == files[1] == ["toy_pred.jsonl", "toy_qry", "toy_score.json", "toy_tgt"]
    (plain, _), (fast, _) = results
    for name in ("toy_pred.jsonl", "toy_score.json"):
        assert (plain / name).read_text() == (fast / name).read_text()
    embeddings = [pickle.loads((out / "toy_qry").read_bytes()) for out in (plain, fast)]
    np.testing.assert_allclose(embeddings[1], embeddings[0], rtol=0, atol=1e-5)
    named = [pickle.loads((out / "toy_tgt").read_bytes()) for out in (plain, fast)]
    assert named[0].keys() == named[1].keys()
    for key, value in named[0].items():
        np.testing.assert_allclose(named[1][key], value, rtol=0, atol=1e-5)


# -- two processes ------------------------------------------------------------------------------


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        sys.path.insert(0, str(STANDIN))
        modules = [importlib.import_module(name) for name in MODULES]
        repository = SimpleNamespace(model=modules[0], processor=modules[1], loss=modules[2])
        same_gradients_across_ranks(repository, rank)
    finally:
        dist.destroy_process_group()


def test_across_processes(tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(tmp_path)), 2)


def same_gradients_across_ranks(repository: Any, rank: int) -> None:
    plain = build(repository, temperature=2.0)
    assert plain.is_ddp
    wrapped: Callable[..., Any] = nn.parallel.DistributedDataParallel(
        plain, find_unused_parameters=True
    )
    x, y = (batch(repository, shift=shift) for shift in (rank, rank + 2))
    results = []
    for accelerated in (False, True):
        plain.zero_grad()
        with patched(repository.model) if accelerated else torch.enable_grad():
            loss = wrapped(qry=x, tgt=y)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (wanted, wanted_grads), (got, got_grads) = results
    assert relative(got, wanted) <= 1e-5
    assert got_grads.keys() == wanted_grads.keys()
    for name, value in wanted_grads.items():
        assert relative(got_grads[name], value) <= 1e-5, name
