"""UME-R1's evaluation: the same embeddings and tokens from the calls that compute less."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ume_models.assets import tiny_checkpoint
from ume_models.errors import PatchError
from ume_models.patching import ume_r1
from ume_models.patching.changes import commit, undo
from ume_models.patching.engine import Engine
from ume_models.patching.recipes import plan
from ume_models.patching.single_pass import single_pass, unpadded

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.compat

STANDIN = Path(__file__).parent / "standins" / "ume_r1"
RECIPE = next(recipe for recipe in ume_r1.RECIPES if recipe.name == "ume-r1")
ITEMS = [
    ("a red circle above a small blue square", None),
    ("two", 3),
    ("green", None),
    ("a picture of many things in a row, one after the other", 7),
    ("", None),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says ``<gen_emb>`` now and then: its head knows that token too well."""
    folder = tmp_path_factory.mktemp("random")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint() / name, folder)
    config = transformers.AutoConfig.from_pretrained(tiny_checkpoint())
    config.tie_word_embeddings = False
    for part in (config, getattr(config, "text_config", config)):
        part.tie_word_embeddings = False
    torch.manual_seed(5)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    token = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()["<gen_emb>"]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        model.lm_head.weight[token] *= 2.5
    model.generation_config = transformers.GenerationConfig(eos_token_id=722, pad_token_id=720)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The stand-in imported; its ``src`` is forgotten afterwards, other stand-ins have one too."""

    def ours(name: str) -> bool:
        return name == "eval_twomode" or name.split(".")[0] == "src"

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    sys.path.insert(0, str(STANDIN))
    try:
        yield importlib.import_module("eval_twomode")
    finally:
        sys.path.remove(str(STANDIN))
        for name in filter(ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(before)


def load(checkpoint: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    kind = transformers.Qwen2VLForConditionalGeneration
    return kind.from_pretrained(checkpoint, attn_implementation=attention).to(dtype).eval()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load(checkpoint)


def batches(script: ModuleType, checkpoint: Path, size: int = 3) -> tuple[DataLoader, Any]:
    processor = script.load_processor(SimpleNamespace(model_name=str(checkpoint)))
    processor.tokenizer.padding_side = "left"
    collator = script.MultimodalEvalDataCollator(processor, None, None, "qry")
    rows = [
        {"query_text": text, "query_image": image, "dataset_infos": {"number": number}}
        for number, (text, image) in enumerate(ITEMS)
    ]
    return DataLoader(rows, batch_size=size, collate_fn=collator), processor


def encode(script: ModuleType, model: Any, checkpoint: Path, mode: str, tokens: int = 8) -> Any:
    """Embeddings of the script's loop, and the tokens it generated."""
    loader, processor = batches(script, checkpoint)
    sequences: list[list[int]] = []
    inner = script.get_gen_embedding_idx

    def noted(ids: Any, token: int) -> Any:
        sequences.extend(torch.as_tensor(row).tolist() for row in ids)
        return inner(ids, token)

    training = SimpleNamespace(device=torch.device("cpu"))
    arguments = SimpleNamespace(model_backbone="qwen2_vl", max_new_tokens=tokens)
    script.get_gen_embedding_idx = noted
    try:
        found, infos = script.encode_embeddings(
            model, loader, training, arguments, ITEMS, "qry", processor=processor, mode=mode
        )
    finally:
        script.get_gen_embedding_idx = inner
    assert [info["number"] for info in infos] == list(range(len(ITEMS)))
    return found, sequences


@pytest.fixture
def patched(script: ModuleType) -> Iterator[ModuleType]:
    before = dict(vars(script))
    changes, _ = plan(RECIPE, script)
    commit(changes)
    yield script
    undo(changes)
    assert dict(vars(script)) == before


@pytest.fixture(scope="module")
def expected(script: ModuleType, model: Any, checkpoint: Path) -> dict[str, Any]:
    return {mode: encode(script, model, checkpoint, mode) for mode in ("disc", "gen")}


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_same_embeddings_and_tokens(
    mode: str,
    expected: Any,
    patched: ModuleType,
    model: Any,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches_of_engine: list[int] = []
    hidden_at = Engine.hidden_at

    def counted(self: Engine, rows: Any, tokens: Any) -> torch.Tensor:
        batches_of_engine.append(len(rows))
        return hidden_at(self, rows, tokens)

    monkeypatch.setattr(Engine, "hidden_at", counted)
    found, tokens = encode(patched, model, checkpoint, mode)
    assert batches_of_engine == ([3, 2] if mode == "disc" else [])
    wanted, wanted_tokens = expected[mode]
    assert tokens == wanted_tokens
    assert np.abs(found - wanted).max() <= 1e-5
    assert "forward" not in vars(model) and not model.model._forward_hooks
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_random_model_says_gen_emb_inside_of_its_text(
    expected: Any, script: ModuleType, checkpoint: Path
) -> None:
    token = batches(script, checkpoint)[1].tokenizer.get_vocab()["<gen_emb>"]
    steps = script.get_gen_embedding_idx(expected["gen"][1], token)
    assert any(step > 0 for step in steps) and -1 in steps


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_eager_attention(mode: str, expected: Any, patched: ModuleType, checkpoint: Path) -> None:
    found, tokens = encode(patched, load(checkpoint, attention="eager"), checkpoint, mode)
    assert tokens == expected[mode][1]
    assert np.abs(found - expected[mode][0]).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(
    dtype: torch.dtype,
    expected: Any,
    script: ModuleType,
    checkpoint: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = load(checkpoint, dtype)
    theirs, _ = encode(script, model, checkpoint, "disc")
    ours, _ = encode(request.getfixturevalue("patched"), model, checkpoint, "disc")
    wanted = expected["disc"][0]
    assert 0 < np.linalg.norm(ours - wanted) <= 2 * np.linalg.norm(theirs - wanted)


def inputs_of(script: ModuleType, checkpoint: Path) -> dict[str, torch.Tensor]:
    batch, _ = next(iter(batches(script, checkpoint)[0]))
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def last(ids: torch.Tensor) -> list[int]:
    return [-1, -2, -9][: len(ids)]


def test_only_what_is_read_is_computed(script: ModuleType, model: Any, checkpoint: Path) -> None:
    inputs = inputs_of(script, checkpoint)
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states[-1]
        with single_pass(model, last):
            states = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1]
        assert int(states.isfinite().all(dim=-1).sum()) == len(wanted)
        for row, place in enumerate((-1, -2, -9)):
            difference = (states[row][place] - wanted[row, place]).norm()
            assert difference <= 1e-5 * wanted[row, place].norm()
        assert int(inputs["attention_mask"][2, 0]) == 0
        with single_pass(model, lambda ids: [-1, -1, 0]):  # padding: every state, without a head
            states = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1]
        assert torch.allclose(states, wanted, atol=1e-5)


def test_calls_that_ask_for_something_else_are_the_original(
    script: ModuleType, model: Any, checkpoint: Path
) -> None:
    inputs = inputs_of(script, checkpoint)
    with torch.no_grad(), single_pass(model, last):
        for options in (
            {},
            {"output_hidden_states": True, "return_dict": False},
            {"output_hidden_states": True, "labels": inputs["input_ids"]},
        ):
            ours = model(**inputs, **options)
            theirs = type(model).forward(model, **inputs, **options)
            assert type(ours) is type(theirs)
            assert torch.equal(ours[0], theirs[0])


def test_positions_without_padding() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    assert unpadded([2, -4, 1], ids, mask) == [0, 0, 1]
    assert unpadded([-1, 3, -2], ids, mask) == [1, 3, 2]
    assert unpadded([1, 0, 0], ids, mask) is None
    assert unpadded([-1, -1, -1], ids, mask) is None
    assert unpadded([-1, 4, 0], ids, mask) is None
    assert unpadded([-1, 0, 2], ids, None) == [3, 0, 2]


def test_with_gradients_the_model_itself_runs(script: ModuleType, checkpoint: Path) -> None:
    model, inputs = load(checkpoint), inputs_of(script, checkpoint)
    gradients = []
    for patch in (False, True):
        model.zero_grad()
        if patch:
            with single_pass(model, last):
                output = model(**inputs, output_hidden_states=True)
        else:
            output = model(**inputs, output_hidden_states=True)
        output.hidden_states[-1][:, -1, ::3].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def test_an_error_in_the_loop_leaves_the_model_as_it_was(
    patched: ModuleType, model: Any, checkpoint: Path
) -> None:
    before = dict(vars(model))

    class Broken:
        tokenizer = None

    loader, _ = batches(patched, checkpoint)
    arguments = SimpleNamespace(model_backbone="qwen2_vl", max_new_tokens=2)
    with pytest.raises(AttributeError):
        patched.encode_embeddings(
            model, loader, SimpleNamespace(device="cpu"), arguments, ITEMS, "qry",
            processor=Broken(), mode="disc",
        )  # fmt: skip
    assert dict(vars(model)) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_unknown_model_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    other = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING), single_pass(other):
        assert "forward" not in vars(other)
    assert "Linear is used as it is" in caplog.text


def test_what_the_look_up_finds_does_not_change(patched: ModuleType) -> None:
    ids = [torch.tensor([5, 9, 1, 2]), torch.tensor([9, 1, 2, 9]), torch.tensor([1]), []]
    for function in (patched.get_gen_embedding_idx, patched.get_disc_embedding_idx):
        assert function(ids, 9) == function.__wrapped__(ids, 9)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("del encode_embeddings", "encode_embeddings: it does not exist"),
        ("del get_gen_embedding_idx", "get_gen_embedding_idx: it does not exist"),
        ("def encode_embeddings(loader, model): pass", "parameter 1 is 'loader', expected 'model'"),
    ],
)
def test_a_script_that_is_not_as_expected(change: str, complaint: str, script: ModuleType) -> None:
    module = ModuleType("eval_twomode")
    vars(module).update({k: v for k, v in vars(script).items() if not k.startswith("__")})
    module.__file__ = script.__file__
    exec(change, vars(module))
    with pytest.raises(PatchError, match=complaint):
        plan(RECIPE, module)
    changes, entries = plan(RECIPE, module, strict=False)
    assert len(changes) == 2
    assert [entry.action for entry in entries].count("missing") == 1


def test_the_recipes_of_the_bundled_evaluation(script: ModuleType) -> None:
    module = ModuleType("eval")
    module.__file__ = script.__file__
    exec(
        "def get_embedding_idx(generated_ids_trimmed, EMBEDDING_TOKEN_ID): pass\n"
        "def encode_embeddings(model, loader, training_args, model_args, full_dataset, "
        "encode_side, description='Encoding', processor=None): pass",
        vars(module),
    )
    fitting = [recipe for recipe in ume_r1.RECIPES if recipe.recognises(module)]
    assert [recipe.name for recipe in fitting] == ["vlm2vec"]
    changes, _ = plan(fitting[0], module)
    assert len(changes) == 2


def test_an_unmodified_script(
    run_script: Any,
    script: ModuleType,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["circle", "square", "red", "green thing", "blue", "five of them"]
    lines = [
        {"text": text, "image": image, "candidates": names[i % 3 :], "label": names[i]}
        for i, (text, image) in enumerate(ITEMS)
    ]
    body = "\n".join(map(json.dumps, lines))
    (tmp_path / "toy.jsonl").write_text(body, encoding="utf-8")
    config = {
        name: {"data_path": "toy.jsonl", "eval_type": kind}
        for name, kind in (("Toy", "global"), ("ToyLocal", "local"))
    }
    (tmp_path / "tasks.yaml").write_text(json.dumps(config), encoding="utf-8")

    def arguments(out: str) -> list[str]:
        given = {
            "model_name": checkpoint,
            "data_basedir": tmp_path,
            "dataset_config": tmp_path / "tasks.yaml",
            "encode_output_path": tmp_path / out,
            "qry_mode": "gen",
            "tgt_mode": "disc",
        }
        return [part for key, value in given.items() for part in (f"--{key}", str(value))]

    def written(out: str) -> dict[str, Any]:
        return {
            path.name: path.read_text(encoding="utf-8")
            if path.suffix
            else pickle.loads(path.read_bytes())
            for path in (tmp_path / out).iterdir()
        }

    monkeypatch.setattr(sys, "argv", ["eval_twomode.py", *arguments("theirs")])
    script.main()
    done = run_script(STANDIN / "eval_twomode.py", *arguments("ours"))
    assert "ume: __main__ (ume-r1): " in done.stderr
    theirs, ours = written("theirs"), written("ours")
    assert set(ours) == set(theirs) and len(ours) == 10
    for name, value in theirs.items():
        if isinstance(value, str):
            assert ours[name] == value
        elif isinstance(value, dict):
            assert list(ours[name]) == list(value)
            assert all(np.abs(ours[name][key] - value[key]).max() <= 1e-5 for key in value)
        else:
            assert np.abs(ours[name] - value).max() <= 1e-5
