"""The sentence-transformers module by itself; the library is not needed for it."""

from __future__ import annotations

import copy
import json
import pickle
from importlib import import_module

import pytest
import torch
from PIL import Image

import ume_models
from ume_models.assets import tiny_checkpoint
from ume_models.errors import CheckpointError, ItemError, UmeError
from ume_models.interfaces.sentence_transformers import PlumeModule

pytestmark = pytest.mark.compat


def embed(module, inputs, prompt=None, **options):
    return module(module.preprocess(inputs, prompt=prompt), **options)["sentence_embedding"]


def test_numbers_are_those_of_encode(model, items, image):
    module = PlumeModule(model)
    assert torch.allclose(embed(module, items), model.encode(items), rtol=0, atol=1e-5)
    mixed = ["a circle", Image.open(image), image, {"text": "b", "instruction": "i"}]
    same = [
        {"text": "P a circle"},
        {"image": image, "text": "P "},
        {"image": image, "text": "P "},
        {"text": "b", "instruction": "P i"},
    ]
    found = embed(module, mixed, "P ")
    assert torch.allclose(found, model.encode(same), rtol=0, atol=1e-5)


def test_options_reach_the_model(model, texts):
    rows = [{"text": text} for text in texts]
    module = PlumeModule(model, mode="disc")
    assert torch.allclose(embed(module, texts), model.encode(rows, mode="disc"), atol=1e-5)
    found = embed(module, texts, mode="gen", latent_steps=2)
    assert torch.allclose(found, model.encode(rows, latent_steps=2), atol=1e-5)
    with pytest.raises(ValueError, match="mode must be"):
        PlumeModule(model, mode="mean")


def test_saved_folder_opens_everywhere(model, texts, tmp_path):
    module = PlumeModule(model, mode="disc", max_seq_length=200)
    module.save(str(tmp_path))
    again = PlumeModule.load(str(tmp_path), model_kwargs={"latent_steps": 3})
    assert again.options() == {**module.options(), "latent_steps": 3}
    assert torch.equal(embed(again, texts), embed(module, texts))
    plain = ume_models.load(tmp_path)
    assert plain.fingerprint == model.fingerprint
    with pytest.raises(ValueError, match="safetensors"):
        module.save(str(tmp_path), safe_serialization=False)


def test_options_of_folders_written_before_there_were_families_count(model, texts, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "ume.json").unlink()
    written = {"mode": "gen", "max_seq_length": 200, "latent_steps": 3, "context": "none"}
    written |= {"max_new_tokens": 1, "disc_offset": 0, "multi_image": "all", "empty": "error"}
    written |= {"min_pixels": 784, "max_pixels": 2359296, "top_k": 1}
    (tmp_path / "sentence_plume_config.json").write_text(json.dumps(written))
    expected = ume_models.load(latent_steps=3, context="none", top_k=1)
    module = PlumeModule.load(str(tmp_path))
    assert module.max_seq_length == 200
    rows = [{"text": text} for text in texts]
    assert torch.allclose(embed(module, texts), expected.encode(rows), rtol=0, atol=1e-5)


def test_folders_name_an_importable_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tiny_checkpoint()):
        (entry,) = json.loads((folder / "modules.json").read_text())
        name, attribute = entry["type"].rsplit(".", 1)
        assert getattr(import_module(name), attribute) is PlumeModule
        assert entry["path"] == ""


def test_prompts_of_a_folder_survive_saving(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    config = first / "config_sentence_transformers.json"
    content = {**json.loads(config.read_text()), "prompts": {"query": "Find: "}}
    config.write_text(json.dumps(content))
    ume_models.load(first).save_pretrained(second)
    assert json.loads((second / config.name).read_text()) == content


def test_long_prompts_raise_and_are_never_cut(model):
    module = PlumeModule(model)
    tokens = module.preprocess(["a b c d e"])["input_ids"].shape[1]
    module.max_seq_length = tokens
    module.preprocess(["a b c d e"])
    with pytest.raises(ItemError, match=f"more than the limit of {tokens}.*'a b c d e f g h i j k"):
        module.preprocess(["a", "a b c d e f g h i j k l m n o p"])
    with pytest.raises(ValueError, match="max_seq_length must be"):
        module.max_seq_length = 10**6
    module.max_seq_length = None
    assert module.max_seq_length == model.config.max_position_embeddings - len(
        [*model.prefix_ids, *model.suffix_ids, *range(model.latent_steps)]
    )


def test_errors_show_the_item_since_its_position_is_unknown(model):
    module = PlumeModule(model)
    with pytest.raises(ItemError, match=r"item: is empty.*\{'text': '  '\}"):
        module.preprocess(["good", {"text": "  "}])
    with pytest.raises(ItemError, match=r"item \(id 'x'\): unknown field 'txt'"):
        module.preprocess([{"txt": "a", "id": "x"}])


def test_unknown_options_and_places_are_named():
    folder = str(tiny_checkpoint())
    with pytest.raises(TypeError, match="latent_stepz"):
        PlumeModule.load(folder, model_kwargs={"latent_stepz": 1})
    with pytest.raises(ValueError, match="onnx"):
        PlumeModule.load(folder, backend="onnx")
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        PlumeModule.load(folder, tokenizer_kwargs={"padding_side": "left"})
    with pytest.raises(CheckpointError, match="no such directory"):
        PlumeModule.load("/no/such/folder")
    with pytest.raises(ValueError, match="processing_kwargs"):
        PlumeModule(ume_models.load()).preprocess(["a"], processing_kwargs={"text": {}})


def test_training_is_refused(model):
    module = PlumeModule(model).train()
    try:
        with pytest.raises(UmeError, match=r"model\.eval\(\)"):
            embed(module, ["a"])
        with torch.no_grad():
            embed(module, ["a"])
    finally:
        module.eval()


def test_copies_and_pickles_work(model, texts):
    module = PlumeModule(model)
    expected = embed(module, texts)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(embed(other, texts), expected)
