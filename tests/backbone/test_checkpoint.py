"""Reading every official layout, merging LoRA, writing back, and refusing damaged files."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ume_models
from ume_models.backbone.checkpoint import write_state
from ume_models.backbone.config import parse_config
from ume_models.embedders import loading, plume
from ume_models.errors import CheckpointError, ErrorKind, OptionError

WEIGHTS = "model.safetensors"


def rewrite(directory, change):
    """Apply ``change(state)`` to the weights of a checkpoint."""
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, directory / WEIGHTS)


def embedding(directory, recorded, **options):
    model = ume_models.load(directory, max_new_tokens=0, **options)
    return model.embed(**recorded.inputs("image_wide"))[0]


def agrees(directory, recorded, **options):
    got = embedding(directory, recorded, **options)
    return float((got - recorded.expected("image_wide", "disc_k8")).abs().max()) <= 1e-5


@pytest.mark.compat
def test_newer_key_prefixes(copied_checkpoint, recorded):
    def newer(state):
        for key in list(state):
            name = key
            if key.startswith("model."):
                name = "model.language_model." + key.removeprefix("model.")
            elif key.startswith("visual."):
                name = "model." + key
            state[name] = state.pop(key)

    rewrite(copied_checkpoint, newer)
    assert agrees(copied_checkpoint, recorded)


def test_shards(copied_checkpoint, recorded):
    state = load_file(copied_checkpoint / WEIGHTS)
    write_state(copied_checkpoint, state, max_shard_bytes=1_000_000)
    shards = sorted(p.name for p in copied_checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert not (copied_checkpoint / WEIGHTS).exists()
    assert agrees(copied_checkpoint, recorded)
    (copied_checkpoint / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"shards .* missing: {re.escape(shards[1])}"):
        ume_models.load(copied_checkpoint)


@pytest.mark.compat
def test_save_and_load_again(tmp_path, load_recorded, recorded):
    load_recorded(engine="fast").save_pretrained(tmp_path / "a")
    saved = load_file(tmp_path / "a" / WEIGHTS)
    assert "model.layers.0.self_attn.q_proj.weight" in saved
    assert "latent_moe_transition.router.weight" in saved
    assert agrees(tmp_path / "a", recorded)
    ume_models.load(tmp_path / "a").save_pretrained(tmp_path / "a")  # onto itself
    assert agrees(tmp_path / "a", recorded)
    again = ume_models.load(tmp_path / "a", engine="reference", max_new_tokens=0)
    assert again.fingerprint == load_recorded(engine="fast").fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"latent_steps": 3, "max_pixels": 40 * 784, "empty": "reference", "pictures": "as_seen"},
        {"mode": "last", "multi_image": "first", "exclude_experts": [1], "top_k": 1},
        {"adapter": False},
    ],
)
def test_what_was_chosen_is_saved(tmp_path, checkpoint_dir, options):
    model = ume_models.load(checkpoint_dir, **options)
    model.save_pretrained(tmp_path)
    again = ume_models.load(tmp_path)
    assert again.load_options == model.load_options
    assert again.processor.convention == model.processor.convention
    assert again.fingerprint == model.fingerprint
    items = [{"text": "a", "image": Image.new("RGB", (900, 500))}]
    assert torch.equal(again.encode(items), model.encode(items))
    other = ume_models.load(tmp_path, latent_steps=5, max_pixels=50 * 784)
    assert (other.options.latent_steps, other.processor.rules.max_pixels) == (5, 50 * 784)
    edit_config(tmp_path, lambda c: c["options"].update(device="cpu"), "ume.json")
    with pytest.raises(OptionError, match="device"):
        ume_models.load(tmp_path)


@pytest.mark.compat
def test_saved_checkpoint_loads_in_transformers(tmp_path, load_recorded, recorded):
    from transformers import Qwen2VLForConditionalGeneration

    model = load_recorded(engine="fast")
    model.save_pretrained(tmp_path)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    expected = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(theirs.model.language_model.layers[1].mlp.up_proj.weight, expected)
    assert torch.equal(theirs.lm_head.weight, model.model.embed_tokens.weight)


def make_lora(directory, base, rank=2, alpha=6.0, **config):
    directory.mkdir()
    torch.manual_seed(0)
    module = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(rank, 128) * 0.1, torch.randn(128, rank) * 0.1
    state = load_file(base / WEIGHTS)
    adapter = {k: v for k, v in state.items() if k.startswith("latent_moe_transition.")}
    save_file(
        {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        },
        directory / "adapter_model.safetensors",
    )
    save_file(adapter, directory / WEIGHTS)
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": str(base),
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return f"{module}.weight", alpha / rank * (b @ a)


def test_lora_is_merged(tmp_path, copied_checkpoint, recorded):
    key, delta = make_lora(tmp_path / "lora", copied_checkpoint)

    def without_adapter(state):
        for name in [k for k in state if k.startswith("latent_moe_transition.")]:
            del state[name]

    merged = tmp_path / "merged"
    ume_models.load(copied_checkpoint).save_pretrained(merged)
    rewrite(merged, lambda state: state.update({key: state[key] + delta}))
    rewrite(copied_checkpoint, without_adapter)  # the adapter is in the LoRA folder
    got = embedding(tmp_path / "lora", recorded)
    torch.testing.assert_close(got, embedding(merged, recorded), rtol=0, atol=1e-6)
    assert float((got - recorded.expected("image_wide", "disc_k8")).abs().max()) > 1e-3
    torch.testing.assert_close(
        got, embedding(tmp_path / "lora", recorded, base=copied_checkpoint), rtol=0, atol=0
    )


def test_lora_that_does_not_fit(tmp_path, copied_checkpoint):
    make_lora(tmp_path / "dora", copied_checkpoint, use_dora=True)
    with pytest.raises(CheckpointError, match=r"only plain LoRA"):
        ume_models.load(tmp_path / "dora")
    make_lora(tmp_path / "lora", copied_checkpoint)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({k.replace("layers.1", "layers.9"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.9.*does not fit"):
        ume_models.load(tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:.*untrained.*")
def test_vocabulary_follows_the_tokenizer(copied_checkpoint, recorded):
    embed = "model.embed_tokens.weight"
    rewrite(
        copied_checkpoint,
        lambda s: s.update({embed: torch.cat([s[embed], torch.full((30, 128), 9.0)])}),
    )
    assert agrees(copied_checkpoint, recorded)
    rewrite(copied_checkpoint, lambda s: s.update({embed: s[embed][:-60]}))
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        ume_models.load(copied_checkpoint)


def test_adapter_is_strict(copied_checkpoint, recorded):
    name = "latent_moe_transition.experts.2.fc1.weight"
    rewrite(copied_checkpoint, lambda s: s.update({name: s[name][:, :64]}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.fc1\.weight is \(256, 64\)"):
        ume_models.load(copied_checkpoint)
    rewrite(copied_checkpoint, lambda s: s.pop(name))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*experts.2.fc1"):
        ume_models.load(copied_checkpoint)
    rewrite(
        copied_checkpoint,
        lambda s: [s.pop(k) for k in list(s) if k.startswith("latent_moe_transition.")],
    )
    with pytest.raises(CheckpointError, match="plume, ume_r1"):
        ume_models.load(copied_checkpoint)
    with pytest.raises(CheckpointError, match="not a PLUME checkpoint"):
        ume_models.load(copied_checkpoint, family="plume")
    assert ume_models.load(copied_checkpoint, adapter=False).latent_moe_transition is None


def test_unknown_adapter_tensors(copied_checkpoint):
    rewrite(copied_checkpoint, lambda s: s.update({"latent_moe_transition.gate": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"no place in the model.*gate"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copied_checkpoint, value):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(copied_checkpoint, lambda s: s[name].view(-1)[77:79].fill_(value))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} has 2 NaN or infinite"):
        ume_models.load(copied_checkpoint)


def test_truncated_weights(copied_checkpoint):
    file = copied_checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        ume_models.load(copied_checkpoint)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        ume_models.load(copied_checkpoint)


def test_pickled_weights_are_not_read(copied_checkpoint):
    (copied_checkpoint / WEIGHTS).rename(copied_checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights.*safetensors only"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json: file not found"),
        ("preprocessor_config.json", "no preprocessor_config.json.*copy it"),
        ("tokenizer.json", "no tokenizer.json or vocab.json; copy"),
    ],
)
def test_missing_files_are_explained(copied_checkpoint, name, message):
    (copied_checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        ume_models.load(copied_checkpoint)


@pytest.mark.compat
def test_missing_chat_template_is_explained(copied_checkpoint, recorded):
    path = copied_checkpoint / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop("chat_template")
    path.write_text(json.dumps(content))
    assert agrees(copied_checkpoint, recorded)  # chat_template.json serves
    (copied_checkpoint / "chat_template.json").unlink()
    with pytest.raises(CheckpointError, match=r"no chat template; copy chat_template.json"):
        ume_models.load(copied_checkpoint)


def test_tokenizer_of_the_base_model(copied_checkpoint):
    path = copied_checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace("<gen_emb>", "<other>"))
    with pytest.raises(CheckpointError, match="<gen_emb>"):
        ume_models.load(copied_checkpoint)


def test_other_architectures_and_paths(copied_checkpoint, tmp_path):
    path = copied_checkpoint / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type is 'llama'"):
        ume_models.load(copied_checkpoint)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"not valid JSON"):
        ume_models.load(copied_checkpoint)
    with pytest.raises(CheckpointError, match=r"no such directory") as caught:
        ume_models.load(tmp_path / "nowhere")
    assert caught.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(CheckpointError, match="is a file"):
        ume_models.load(path)


def test_arguments_out_of_range(checkpoint_dir):
    for options, message in (
        ({"latent_steps": -1}, "latent_steps"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"pictures": "mine"}, "pictures must be"),
        ({"min_pixels": "many"}, "min_pixels"),
        ({"context": "both"}, "context must be"),
        ({"engine": "quick"}, "engine must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"top_k": 9}, "top_k must be 1 … 4"),
    ):
        with pytest.raises(OptionError, match=message):
            ume_models.load(checkpoint_dir, **options)


def edit_config(directory, change, name="config.json"):
    path = directory / name
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=2), "have no place in the model"),
        (lambda c: c["vision_config"].update(depth=1), "have no place in the model"),
        (lambda c: c.update(num_hidden_layers=10**12), "num_hidden_layers"),
        (lambda c: c.pop("intermediate_size"), "intermediate_size is None"),
        (lambda c: c.update(num_key_value_heads=None), "num_key_value_heads is None"),
        (lambda c: c.update(num_key_value_heads=3), "cannot share 3"),
        (lambda c: c.update(rope_theta="x"), "rope_theta"),
        (lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps"),
        (lambda c: c.update(text_config=[1]), "text_config"),
        (lambda c: c.update(tie_word_embeddings="false"), "tie_word_embeddings"),
        (lambda c: c.update(head_dim=-32), "head_dim"),
        (lambda c: c.update(rope_scaling="mrope"), "rope_scaling"),
        (lambda c: c["rope_scaling"].update(mrope_section=[-4, 10, 10]), "mrope_section"),
        (lambda c: c["rope_scaling"].update(mrope_section=3), "mrope_section"),
        (lambda c: c["rope_scaling"].update(mrope_section=["4", 6, 6]), "mrope_section"),
        (lambda c: c["vision_config"].update(num_heads=3), "vision_config"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), "vision_config"),
        (lambda c: c.update(image_token_id=5), "image_token_id 5"),
        (lambda c: c.update(quantization_config={"bits": 8}), "quantised"),
    ],
)
def test_configurations_that_cannot_be(copied_checkpoint, change, message):
    edit_config(copied_checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize("value", [None, True, "64", 1.5, [], {}, -64, 0, 10**30, 1e300])
@pytest.mark.parametrize(
    "name",
    ["depth", "embed_dim", "hidden_size", "in_channels", "num_heads", "patch_size",
     "spatial_merge_size", "temporal_patch_size"],
)  # fmt: skip
def test_sizes_of_the_vision_tower_that_cannot_be(copied_checkpoint, name, value):
    edit_config(copied_checkpoint, lambda c: c["vision_config"].update({name: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name} is ") as caught:
        ume_models.load(copied_checkpoint)
    assert caught.value.kind is ErrorKind.DAMAGED


@pytest.mark.parametrize("value", [None, "2", -2, 0, 1e300, float("nan"), 10**400])
def test_mlp_ratios_that_cannot_be(copied_checkpoint, value):
    edit_config(copied_checkpoint, lambda c: c["vision_config"].update(mlp_ratio=value))
    with pytest.raises(CheckpointError, match=r"config\.json.*mlp_ratio"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", 1),
        ("window_size", None),
        ("fullatt_block_indexes", 7),
        ("fullatt_block_indexes", [None]),
        ("tokens_per_second", "2"),
        ("intermediate_size", 10**30),
        ("out_hidden_size", [64]),
    ],
)
def test_windowed_vision_towers_that_cannot_be(qwen25_checkpoint, name, value):
    raw = json.loads((qwen25_checkpoint / "config.json").read_text())
    raw["vision_config"] = {**raw["vision_config"], name: value}
    with pytest.raises(CheckpointError, match=name):
        parse_config(raw)


JSON_FILES = ("config.json", "preprocessor_config.json", "generation_config.json")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, '{"a":' * 400 + "1" + "}" * 400, '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "endless", "deep", "long number"],
)
def test_json_that_is_none(copied_checkpoint, name, content):
    (copied_checkpoint / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        ume_models.load(copied_checkpoint)


def test_a_pipe_is_not_waited_for(copied_checkpoint):
    (copied_checkpoint / "config.json").unlink()
    os.mkfifo(copied_checkpoint / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ume_models.load(copied_checkpoint)


def test_ids_that_no_row_has(copied_checkpoint):
    def change(content):
        model = content["model"]
        model["vocab"] = {token: row + 10**6 for token, row in model["vocab"].items()}

    edit_config(copied_checkpoint, change, "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer has .* ids up to"):
        ume_models.load(copied_checkpoint)


@pytest.mark.compat
def test_what_only_others_read_of_a_configuration(copied_checkpoint, recorded):
    edit_config(copied_checkpoint, lambda c: c.update(use_cache="no", id2label="x"))
    assert agrees(copied_checkpoint, recorded)
    name = "tokenizer_config.json"
    edit_config(copied_checkpoint, lambda c: c.update(model_max_length="x"), name)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: model_max_length"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize("value", ["x", [None], {}, -1, True, 1.5, [[1]]])
def test_end_tokens_that_cannot_be(copied_checkpoint, value):
    edit_config(copied_checkpoint, lambda c: c.update(eos_token_id=value), "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize("content", ["{}", '{"chat_template": 3}', "[]", "{"])
def test_chat_templates_that_cannot_be(copied_checkpoint, content):
    edit_config(copied_checkpoint, lambda c: c.pop("chat_template"), "tokenizer_config.json")
    (copied_checkpoint / "chat_template.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"chat_template"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model_name_or_path", ["a"]),
        ("base_model_name_or_path", None),
        ("r", "2"),
        ("r", 0),
        ("lora_alpha", float("nan")),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "6"}),
    ],
)
def test_adapter_configurations_that_cannot_be(tmp_path, copied_checkpoint, name, value):
    make_lora(tmp_path / "lora", copied_checkpoint, **{name: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json.*{name}"):
        ume_models.load(tmp_path / "lora")


@pytest.mark.parametrize("defect", [TypeError, AttributeError, KeyError, ZeroDivisionError])
def test_defects_of_this_package_are_not_blamed_on_the_files(checkpoint_dir, monkeypatch, defect):
    def broken(*_):
        raise defect

    monkeypatch.setattr(plume, "token_ids", broken)
    for look in (ume_models.load, loading.examine):
        with pytest.raises(defect):
            look(checkpoint_dir)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["null", "[]", '"x"'])
def test_json_that_is_no_object(copied_checkpoint, name, content):
    (copied_checkpoint / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: expected a JSON object"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize(
    "weight_map", [None, [], ["a"], {"a": 1}, {"a": []}, {"a": "../b.safetensors"}]
)
def test_index_files_that_cannot_be_used(copied_checkpoint, weight_map):
    index = copied_checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        ume_models.load(copied_checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_quantised_weights(copied_checkpoint, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copied_checkpoint, lambda s: s.update({name: s[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        ume_models.load(copied_checkpoint)


def test_float64_weights_become_float32(copied_checkpoint, recorded):
    rewrite(copied_checkpoint, lambda s: s.update({k: v.double() for k, v in s.items()}))
    assert ume_models.load(copied_checkpoint).dtype == torch.float32
    assert agrees(copied_checkpoint, recorded)


def test_pickled_lora_is_not_ignored(tmp_path, copied_checkpoint):
    make_lora(tmp_path / "lora", copied_checkpoint)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickled adapters are not read"):
        ume_models.load(tmp_path / "lora")
    make_lora(tmp_path / "zero", copied_checkpoint, r=0)
    with pytest.raises(CheckpointError, match="r is 0"):
        ume_models.load(tmp_path / "zero")


def test_saved_lora_keeps_its_own_tokenizer(tmp_path, copied_checkpoint, recorded):
    make_lora(tmp_path / "lora", copied_checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "lora" / name).write_bytes((copied_checkpoint / name).read_bytes())
    path = copied_checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace("<gen_emb>", "<other>"))
    expected = embedding(tmp_path / "lora", recorded)
    ume_models.load(tmp_path / "lora").save_pretrained(tmp_path / "saved")
    got = embedding(tmp_path / "saved", recorded)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_fingerprints_tell_models_apart(copied_checkpoint):
    original = ume_models.load(copied_checkpoint).fingerprint
    assert ume_models.load(copied_checkpoint, top_k=1).fingerprint != original
    assert ume_models.load(copied_checkpoint, adapter=False).fingerprint != original
    edit_config(copied_checkpoint, lambda c: c.update(rope_theta=1e4))
    seen = {original, ume_models.load(copied_checkpoint).fingerprint}
    edit_config(copied_checkpoint, lambda c: c.update(rope_theta=1e6))
    assert ume_models.load(copied_checkpoint).fingerprint == original

    def one_value(state):
        state["model.layers.1.mlp.up_proj.weight"].view(-1)[777] += 1e-3

    rewrite(copied_checkpoint, one_value)
    seen.add(ume_models.load(copied_checkpoint).fingerprint)
    edit_config(
        copied_checkpoint,
        lambda c: c.update(chat_template=c["chat_template"].replace("helpful", "kind")),
        "tokenizer_config.json",
    )
    seen.add(ume_models.load(copied_checkpoint).fingerprint)
    assert len(seen) == 4


def test_devices_that_are_not_there(checkpoint_dir):
    for device, message in (("mps", "not supported"), ("gpu", "unknown device")):
        with pytest.raises(ValueError, match=message):
            ume_models.load(checkpoint_dir, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no device 'cuda'"):
            ume_models.load(checkpoint_dir, device="cuda")
