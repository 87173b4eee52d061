"""The stand-in of PLUME's evaluation, patched and not: same embeddings, rankings and files."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from torch import nn

from ume_models import patching
from ume_models.assets import tiny_checkpoint
from ume_models.patching import plume_eval
from ume_models.patching.engine import Engine
from ume_models.patching.look_ahead import LookAhead, limits

pytestmark = pytest.mark.compat

SCRIPT = Path(__file__).parent / "standins" / "plume" / "VLM2Vec" / "eval_twomode.py"
SUFFIX = "<eot></think>\\n<gen_emb>"
WORDS = "red blue green yellow circle triangle star square above below left of the a".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven queries, every second with an image, and nine candidates."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def line(number: int, pictured: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"text": " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))}
        if pictured:
            width, height = rng.integers(40, 140, 2)
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            found["image"] = str(folder / f"{number}.png")
            Image.fromarray(pixels).save(found["image"])
        return found

    names = [f"c{i}" for i in range(9)]
    queries = [
        {**line(i, i % 2 == 1), "label": names[i], "candidates": names[i : i + 3]} for i in range(7)
    ]
    corpus = [{**line(10 + i, i % 3 == 0), "name": name} for i, name in enumerate(names)]
    for name, lines in (("queries", queries), ("corpus", corpus)):
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (folder / f"{name}.jsonl").write_text(text)
    files = {
        "dataset_parser": "jsonl", "data_path": "queries.jsonl", "corpus_path": "corpus.jsonl",
    }  # fmt: skip
    tasks = {kind.upper(): {**files, "eval_type": kind} for kind in ("global", "local")}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    return folder


def options(data: Path, out: Path, **changed: Any) -> list[str]:
    chosen = {
        "model_name": tiny_checkpoint(),
        "dataset_config": data / "tasks.yaml",
        "data_basedir": data,
        "encode_output_path": out,
        "attn_implementation": "sdpa",
        "torch_dtype": "float32",
        "use_coconut_latent_reasoning": True,
        "use_coconut_latent_moe": True,
        "coconut_latent_moe_context_type": "disc",
        "coconut_latent_steps": 3,
        "coconut_forced_suffix_text": SUFFIX,
        **changed,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; nothing of it stays in ``sys.modules``."""
    transformers.logging.set_verbosity_error()
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("eval_twomode")
    finally:
        sys.path.remove(str(SCRIPT.parent))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("src", "eval_twomode"):
                del sys.modules[name]


@pytest.fixture
def patched(script: ModuleType) -> Iterator[ModuleType]:
    report = patching.apply(script)
    yield script
    patching.revert(report)


@pytest.fixture
def ported(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The original as flash-attention would run it."""
    monkeypatch.setattr(script, "PORTED", True)
    return script


class Setting:
    """Model, processor and arguments as the script's ``main`` makes them."""

    def __init__(self, script: ModuleType, data: Path, **changed: Any) -> None:
        parser = transformers.HfArgumentParser(
            (
                script.ModelArguments,
                script.DataArguments,
                script.TrainingArguments,
                script.EvalArguments,
            )
        )
        arguments = parser.parse_args_into_dataclasses(options(data, data / "out", **changed))
        self.model_args, self.data_args, self.training_args, self.eval_args = arguments
        self.model_args.model_backbone = "qwen2_vl"
        self.processor = script.load_processor(self.model_args, self.data_args)
        self.processor.tokenizer.padding_side = "left"
        self.model = script._load_qwen_generation_model(
            self.model_args, self.processor, eval_args=self.eval_args
        ).eval()
        instantiate = script.AutoEvalPairDataset.instantiate
        files = {key: data / f"{key}.jsonl" for key in ("queries", "corpus")}
        self.queries, self.corpus = instantiate(
            "jsonl", self.model_args, self.data_args, files["queries"], files["corpus"]
        )

    def loader(self, script: ModuleType, rows: Any = None) -> Any:
        collator = script.MultimodalEvalDataCollator(
            self.processor, self.model_args, self.data_args, "qry"
        )
        rows = self.queries if rows is None else rows
        return script.DataLoader(rows, batch_size=1, collate_fn=collator)

    def encode(self, script: ModuleType, loader: Any = None, **changed: Any) -> Any:
        return script.encode_embeddings(
            self.model,
            self.loader(script) if loader is None else loader,
            self.training_args,
            self.model_args,
            self.queries,
            encode_side="qry",
            processor=self.processor,
            eval_args=self.eval_args,
            **changed,
        )

    def call(self, script: ModuleType, inputs: Any, **changed: Any) -> Any:
        """One direct call of the latent function."""
        tokenizer = self.processor.tokenizer
        arguments = {
            "max_new_tokens": 16,
            "latent_steps": 3,
            "prefix_token_ids": tokenizer.encode("<think><bot>", add_special_tokens=False),
            "forced_suffix_token_ids": tokenizer.encode(
                SUFFIX.replace("\\n", "\n"), add_special_tokens=False
            ),
            "gen_emb_token_id": tokenizer.convert_tokens_to_ids("<gen_emb>"),
            "use_latent_moe": True,
            "latent_moe_context_type": "disc",
            "disc_emb_token_id": tokenizer.convert_tokens_to_ids("<disc_emb>"),
            **changed,
        }
        with torch.no_grad():
            return script._latent_reasoning_generate_rep(
                model=self.model, inputs=dict(inputs), tokenizer=tokenizer, **arguments
            )


@pytest.fixture(scope="module")
def shared(script: ModuleType, data: Path) -> Setting:
    return Setting(script, data)


@pytest.fixture
def setting(script: ModuleType, data: Path) -> Setting:
    return Setting(script, data)


@pytest.fixture(scope="module")
def expected(script: ModuleType, shared: Setting) -> Any:
    """Embeddings of the original, ported."""
    script.PORTED = True
    try:
        return shared.encode(script)
    finally:
        script.PORTED = False


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the engine ran."""
    sizes: list[int] = []
    run = Engine.rollout

    def counted(self: Engine, rows: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(rows))
        return run(self, rows, *args, **kwargs)

    monkeypatch.setattr(Engine, "rollout", counted)
    return sizes


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    np.testing.assert_array_less(np.linalg.norm(found - wanted, axis=-1), tolerance)


# -- the loop --------------------------------------------------------------------------------------


def test_embeddings_order_and_flags(
    patched: ModuleType, shared: Setting, expected: Any, batches: list[int]
) -> None:
    embeddings, infos, hits = shared.encode(patched)
    close(embeddings, expected[0])
    assert infos == expected[1] == [row["dataset_infos"] for row in shared.queries]
    assert hits == expected[2] == 0
    assert batches == [7]  # all of it at once, behind the one-sample guards


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_right_where_the_original_is_not(
    script: ModuleType,
    data: Path,
    expected: Any,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The official suffix mask fails, hides the cache, or its inputs are refused."""
    own = Setting(script, data, attn_implementation=attention, max_new_tokens=2)
    try:
        wrong = np.abs(own.encode(script)[0] - expected[0]).max()
    except (RuntimeError, ValueError):
        wrong = np.inf
    assert wrong > 1e-2
    report = patching.apply(script)
    assert [entry.target for entry in report.repaired] == ["eval_twomode._get_backbone_model"]
    close(own.encode(script)[0], expected[0])
    # the decode loop of the original, behind the repaired decoder
    own.model.generation_config.eos_token_id = [0]
    embeddings, _, hits = own.encode(script)
    patching.revert(report)
    monkeypatch.setattr(script, "PORTED", True)
    wanted = own.encode(script)
    assert hits == wanted[2] == 7
    close(embeddings, wanted[0])


@pytest.mark.parametrize("ahead", [1, 3, 7])
def test_chunks_of_any_size(
    patched: ModuleType,
    shared: Setting,
    expected: Any,
    batches: list[int],
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UME_LOOK_AHEAD", str(ahead))
    close(shared.encode(patched)[0], expected[0])
    assert batches == {1: [1] * 7, 3: [3, 3, 1], 7: [7]}[ahead]


def test_memory_running_out_halves_the_batch(
    patched: ModuleType, shared: Setting, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    run = Engine.rollout

    def limited(self: Engine, rows: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, rows, *args, **kwargs)

    monkeypatch.setattr(Engine, "rollout", limited)
    close(shared.encode(patched)[0], expected[0])
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_an_error_of_the_loader_comes_at_its_sample(
    patched: ModuleType, shared: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(
        patched, "batch_to_device", lambda batch, device: moved.append(batch) or dict(batch)
    )
    items = list(shared.loader(patched))

    def failing() -> Iterator[Any]:
        yield from items[:6]
        raise OSError("item 7 cannot be read")

    with pytest.raises(OSError, match="item 7"):
        shared.encode(patched, failing())
    assert [id(batch) for batch in moved] == [id(inputs) for inputs, _ in items[:6]]


def a_new_dict(batch: Any) -> Any:
    return {**batch, "pixel_values": batch["pixel_values"] * 0.5}


def its_own_dict(batch: Any) -> Any:
    batch["pixel_values"] = batch["pixel_values"] * 0.5
    return batch


def its_own_tensor(batch: Any) -> Any:
    batch["pixel_values"].mul_(0.5)
    return batch


@pytest.mark.parametrize("dimmed", [a_new_dict, its_own_dict, its_own_tensor])
def test_inputs_changed_on_the_way_are_computed_as_they_are(
    patched: ModuleType, shared: Setting, monkeypatch: pytest.MonkeyPatch, dimmed: Any
) -> None:
    monkeypatch.setattr(patched, "batch_to_device", lambda batch, device: dimmed(batch))
    found = shared.encode(patched)[0]
    monkeypatch.setattr(patched, "batch_to_device", lambda batch, device: dict(batch))
    inputs = [dimmed(inputs) for inputs, _ in shared.loader(patched)]
    close(found, np.stack([shared.call(patched, one)[0].numpy() for one in inputs]))


def test_rows_that_go_on_decoding(ported: ModuleType, data: Path, batches: list[int]) -> None:
    """Some rows end after the suffix, some later, some not within the budget."""
    own = Setting(ported, data, max_new_tokens=3)
    samples = [inputs for inputs, _ in own.loader(ported)]
    states = torch.stack(
        [own.call(ported, one, collect_latent_trace=True)[2]["gen_hidden"] for one in samples]
    )
    torch.manual_seed(1)
    own.model.lm_head = nn.Linear(128, 742, bias=False)
    with torch.no_grad():  # what the rows have in common says nothing, so that each has a word
        common = nn.functional.normalize(states.mean(0), dim=0)
        own.model.lm_head.weight -= (own.model.lm_head.weight @ common)[:, None] * common
        words = own.model.lm_head(states).argmax(-1).tolist()
    own.model.generation_config.eos_token_id = words[:3]
    wanted = own.encode(ported)
    report = patching.apply(ported)
    found = own.encode(ported)
    traced = [own.call(ported, one, max_new_tokens=3) for one in samples]
    patching.revert(report)
    close(found[0], wanted[0])
    assert 0 < sum(word in words[:3] for word in words) < 7
    assert 0 < wanted[2] < 7
    assert found[2] == wanted[2] == sum(hit for _, hit, _ in traced)


def test_a_sample_that_generates_another_gen_emb(ported: ModuleType, setting: Setting) -> None:
    """Then that one is the embedding, although the original stops there."""
    gen = setting.processor.tokenizer.convert_tokens_to_ids("<gen_emb>")
    inputs = next(iter(setting.loader(ported)))[0]
    with torch.no_grad():
        setting.model.lm_head.weight = nn.Parameter(setting.model.lm_head.weight.clone())
        hidden = setting.call(ported, inputs, collect_latent_trace=True)[2]["gen_hidden"]
        setting.model.lm_head.weight[gen] = hidden * 10
    setting.model.generation_config.eos_token_id = [gen]
    wanted = setting.call(ported, inputs)
    other = setting.call(ported, inputs, max_new_tokens=0)
    report = patching.apply(ported)
    found = setting.call(ported, inputs)
    patching.revert(report)
    assert (wanted[0] - other[0]).norm() > 1e-2
    close(found[0], wanted[0])


def test_weights_changed_between_two_calls(ported: ModuleType, setting: Setting) -> None:
    inputs = [one for one, _ in setting.loader(ported)][:2]

    def both(change: Callable[[], Any]) -> list[Any]:
        first = setting.call(ported, inputs[0])[0]
        change()
        return [first, setting.call(ported, inputs[0])[0], setting.call(ported, inputs[1])[0]]

    norm = setting.model.model.language_model.norm.weight
    adapter = setting.model.latent_moe_transition

    def louder() -> None:
        with torch.no_grad():
            norm[:64] *= 1.25
            adapter.experts[0].fc2.bias += 0.5

    def softer() -> None:
        with torch.no_grad():
            norm[:64] /= 1.25
            adapter.experts[0].fc2.bias -= 0.5

    wanted = both(louder)
    softer()
    report = patching.apply(ported)
    found = both(louder)
    setting.model.resize_token_embeddings(750)
    resized = setting.call(ported, inputs[1])[0]
    patching.revert(report)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)
    close(resized, wanted[2])


# -- single calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"use_latent_moe": False},
        {"latent_moe_context_type": "prefix_last"},
        {"latent_moe_context_type": "none"},
        {"disc_emb_token_id": -1},
        {"disc_emb_token_id": 5},  # not in the prompt
        {"latent_steps": 0},
        {"latent_steps": 1},
        {"max_new_tokens": 0},
        {"prefix_token_ids": []},
    ],
    ids=lambda changed: "-".join(f"{k}={v}" for k, v in changed.items()) or "plain",
)
def test_single_calls_with_their_trace(
    ported: ModuleType, shared: Setting, changed: dict[str, Any], batches: list[int]
) -> None:
    inputs = [one for one, _ in shared.loader(ported, shared.queries[:2])]
    arguments = {"collect_latent_trace": True, **changed}
    wanted = [shared.call(ported, one, **arguments) for one in inputs]
    report = patching.apply(ported)
    found = [shared.call(ported, one, **arguments) for one in inputs]
    patching.revert(report)
    assert batches == [1, 1]
    for (rep, hit, trace), (wanted_rep, wanted_hit, wanted_trace) in zip(
        found, wanted, strict=True
    ):
        close(rep, wanted_rep)
        assert hit is wanted_hit
        assert trace.keys() == wanted_trace.keys()
        for name, value in wanted_trace.items():
            if value is None:
                assert trace[name] is None
            else:
                torch.testing.assert_close(trace[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"debug_log_tokens": True}, "debug_log_tokens"),
        ({"forced_suffix_token_ids": [60, 61], "max_new_tokens": 2}, "does not end with <gen_emb>"),
        ({"forced_suffix_token_ids": [], "max_new_tokens": 0}, "does not end with <gen_emb>"),
    ],
)
def test_what_the_original_does(
    ported: ModuleType,
    shared: Setting,
    changed: dict[str, Any],
    reason: str,
    batches: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = next(iter(shared.loader(ported)))[0]
    wanted = shared.call(ported, inputs, **changed)
    report = patching.apply(ported)
    plume_eval._told.clear()
    found = shared.call(ported, inputs, **changed)
    patching.revert(report)
    assert batches == []
    assert reason in caplog.text
    assert found[1] is wanted[1]
    torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)


def test_hooks_and_training_mode_see_the_original(
    ported: ModuleType, setting: Setting, batches: list[int]
) -> None:
    inputs = next(iter(setting.loader(ported)))[0]
    report = patching.apply(ported)
    seen: list[int] = []
    handle = setting.model.model.language_model.norm.register_forward_hook(
        lambda *_: seen.append(1)
    )
    hooked = setting.call(ported, inputs)[0]
    handle.remove()
    calls = len(seen)
    setting.model.train()
    training = setting.call(ported, inputs)[0]
    setting.model.eval()
    assert batches == []
    assert calls == 3 + 3  # prefix, suffix, one token; latent steps
    close(setting.call(ported, inputs)[0], hooked)
    close(training, hooked)
    patching.revert(report)


def test_errors_of_the_original_are_its_own(
    patched: ModuleType, shared: Setting, setting: Setting
) -> None:
    inputs = next(iter(shared.loader(patched)))[0]
    two = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="per_device_eval_batch_size=1"):
        shared.call(patched, two)
    with pytest.raises(ValueError, match="must be one of"):
        shared.call(patched, inputs, latent_moe_context_type="other")
    del setting.model.latent_moe_transition
    with pytest.raises(RuntimeError, match="no latent_moe_transition"):
        setting.call(patched, inputs)


def test_bfloat16_is_no_further_from_the_truth(
    ported: ModuleType, data: Path, expected: Any
) -> None:
    own = Setting(ported, data, torch_dtype="bfloat16")
    own.model.to(dtype=torch.bfloat16)
    wanted = own.encode(ported)[0]
    inputs = next(iter(own.loader(ported)))[0]
    dtype = own.call(ported, inputs)[0].dtype
    report = patching.apply(ported)
    found = own.encode(ported)[0]
    assert own.call(ported, inputs)[0].dtype == dtype == torch.bfloat16
    patching.revert(report)
    truth = expected[0]
    assert np.linalg.norm(found - truth) <= 2 * np.linalg.norm(wanted - truth)


# -- everything else -------------------------------------------------------------------------------


def test_other_modes_are_the_same(ported: ModuleType, shared: Setting) -> None:
    wanted = shared.encode(ported, mode="disc")
    report = patching.apply(ported)
    found = shared.encode(ported, mode="disc")
    patching.revert(report)
    close(found[0], wanted[0])
    assert found[1] == wanted[1]


def test_revert_and_twice(script: ModuleType) -> None:
    before = dict(vars(script))
    report = patching.apply(script)
    names = {change.name for change in report.changes}
    assert {"encode_embeddings", "_latent_reasoning_generate_rep", "_get_backbone_model"} <= names
    assert not patching.apply(script).replaced
    for name in names:
        assert getattr(script, name) is not before[name]
    patching.revert(report)
    assert {name: value for name, value in vars(script).items() if value is not before[name]} == {}


def test_another_signature_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_embeddings(network: Any, loader: Any) -> None:
        raise AssertionError("not called")

    encode_embeddings.__module__ = script.__name__
    monkeypatch.setattr(script, "encode_embeddings", encode_embeddings)
    rep = script._latent_reasoning_generate_rep
    with pytest.raises(patching.PatchError, match=r"encode_embeddings: .*'network'"):
        patching.apply(script)
    assert script._latent_reasoning_generate_rep is rep


def test_look_ahead_is_a_loader() -> None:
    def item(tokens: int) -> Any:
        return {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}, ["info"]

    class Loader(list[Any]):
        dataset = "kept"

    source = Loader(item(n) for n in (5, 6, 90, 2, 3))
    ahead = LookAhead(source, samples=4, tokens=100)
    assert len(ahead) == 5
    assert ahead.dataset == "kept"
    seen = []
    for inputs, _ in ahead:
        coming = ahead.coming[0]
        assert coming is not None
        assert coming.inputs["input_ids"] is inputs["input_ids"]
        seen.append((ahead.chunk, len(ahead.coming)))
    assert seen == [(1, 3), (1, 2), (1, 1), (2, 2), (2, 1)]


@pytest.mark.parametrize("what", ["the object", "the memory"])
def test_a_loader_that_fills_the_same_again(what: str) -> None:
    def items() -> Iterator[Any]:
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
        for number in range(6):
            if what == "the object":
                inputs["input_ids"] = torch.full((1, 3), number)
                yield inputs, [number]
            else:
                inputs["input_ids"].fill_(number)
                yield dict(inputs), [number]

    ahead = LookAhead(items())
    seen = [(inputs["input_ids"][0].tolist(), infos, ahead.chunk) for inputs, infos in ahead]
    assert [(ids, infos) for ids, infos, _ in seen] == [([n] * 3, [n]) for n in range(6)]
    assert [chunk for _, _, chunk in seen] == [1, 1, 2, 3, 4, 5]


def test_samples_may_share_what_does_not_change() -> None:
    image = torch.ones(4, 5)
    items = [({"input_ids": torch.full((1, 2), n), "pixel_values": image}, [n]) for n in range(6)]
    ahead = LookAhead(items)
    assert [ahead.chunk for _ in ahead] == [1] * 6


def test_limits_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UME_LOOK_AHEAD_TOKENS", "")
    assert limits() == (64, 16384)
    monkeypatch.setenv("UME_LOOK_AHEAD", "none")
    with pytest.raises(ValueError, match="UME_LOOK_AHEAD='none'; give a whole number"):
        limits()


def test_the_unmodified_script_on_two_processes(
    run_script: Any, data: Path, tmp_path: Path, ported: ModuleType, monkeypatch: Any
) -> None:
    """Its files, made by two accelerated processes, against those of the original in one."""
    arguments = ["eval_twomode.py", *options(data, tmp_path / "one")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--ported", "True"])
    ported.main()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_script(SCRIPT, *options(data, tmp_path / "two"), launcher=launcher)
    assert "__main__ (plume-eval): 1 repaired" in done.stderr
    for path in sorted((tmp_path / "one").iterdir()):
        other = tmp_path / "two" / path.name
        if path.suffix:
            assert other.read_text() == path.read_text(), path.name
            continue
        wanted, found = pickle.loads(path.read_bytes()), pickle.loads(other.read_bytes())
        if isinstance(wanted, dict):
            assert list(wanted) == list(found)
            wanted, found = (np.stack(list(d.values())) for d in (wanted, found))
        close(found, wanted)
