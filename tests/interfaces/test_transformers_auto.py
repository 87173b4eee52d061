"""The Auto classes and the feature-extraction pipeline of every supported transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import ume_models
from ume_models.assets import tiny_checkpoint
from ume_models.errors import CheckpointError, ItemError, UmeError
from ume_models.interfaces import register_auto_classes, save_for_auto
from ume_models.interfaces.transformers_auto import PlumeConfig, PlumeModel
from ume_models.interfaces.transformers_processor import PlumeProcessor, PlumeTokenizer

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_auto_classes()
    register_auto_classes()  # twice is harmless


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_for_auto(None, tmp_path_factory.mktemp("auto"))


@pytest.fixture(scope="module")
def auto(folder):
    return AutoModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(str(folder))


def test_auto_classes_open_an_exported_folder(folder, auto, processor):
    config = AutoConfig.from_pretrained(str(folder))
    assert isinstance(config, PlumeConfig) and config.hidden_size == auto.plume.hidden_size
    assert isinstance(auto, PlumeModel) and type(processor) is PlumeProcessor
    assert type(AutoTokenizer.from_pretrained(str(folder))) is PlumeTokenizer
    assert auto.dtype == torch.float32 and auto.device.type == "cpu" and not auto.training
    # the checkpoint inside is an ordinary one
    assert ume_models.load(folder / "plume").fingerprint == auto.plume.fingerprint


def test_numbers_are_those_of_encode(auto, processor, model, items):
    output = auto(**processor(items=items))
    expected = model.encode(items)
    assert torch.allclose(output.embeddings, expected, rtol=0, atol=1e-5)
    assert torch.equal(output.last_hidden_state[:, 0], output.embeddings)
    assert torch.equal(output[0], output.last_hidden_state)
    plain = auto(**processor(items=items[:2]), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 2


def test_rows_of_texts_images_and_videos(auto, processor, model, image):
    picture = Image.open(image)
    batch = processor(
        text=["a", "b", None, "d"],
        images=[None, picture, image, None],
        videos=[None, None, None, [picture, picture]],
        instruction="Represent:",
    )
    expected = [
        {"text": "a", "instruction": "Represent:"},
        {"text": "b", "image": image, "instruction": "Represent:"},
        {"image": image, "instruction": "Represent:"},
        {"text": "d", "video": [image, image], "instruction": "Represent:"},
    ]
    assert torch.allclose(auto(**batch).embeddings, model.encode(expected), rtol=0, atol=1e-5)
    one = auto(**processor("a")).embeddings
    assert torch.allclose(one, model.encode([{"text": "a"}]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_path", [True, False])
def test_feature_extraction_pipeline(folder, auto, model, texts, by_path):
    if by_path:
        extract = pipeline("feature-extraction", model=str(folder), device="cpu")
    else:
        tokenizer = PlumeTokenizer.from_pretrained(tiny_checkpoint())
        extract = pipeline("feature-extraction", model=auto, tokenizer=tokenizer)
    expected = model.encode([{"text": text} for text in texts])
    one = extract(texts[0])
    assert len(one) == len(one[0]) == 1
    assert torch.allclose(torch.tensor(one[0][0]), expected[0], rtol=0, atol=1e-5)
    for options in ({}, {"batch_size": 2}):
        found = torch.tensor(extract(texts, **options))[:, 0, 0]
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert extract(texts[0], return_tensors=True).shape == (1, 1, model.hidden_size)


def test_published_checkpoints_open_with_their_configuration_translated(auto, model, texts):
    path = str(tiny_checkpoint())
    opened = AutoModel.from_pretrained(path, config=PlumeConfig.from_pretrained(path))
    batch = PlumeProcessor.from_pretrained(path)(texts)
    expected = model.encode([{"text": text} for text in texts])
    assert torch.allclose(opened(**batch).embeddings, expected, rtol=0, atol=1e-5)
    assert torch.equal(PlumeModel.from_pretrained(path)(**batch).embeddings, auto(**batch)[1])


def test_options_are_kept_in_the_configuration(folder, texts, processor, model, tmp_path):
    opened = AutoModel.from_pretrained(str(folder), latent_steps=2, mode="gen")
    batch = processor(texts)
    expected = model.encode([{"text": text} for text in texts], latent_steps=2)
    assert torch.allclose(opened(**batch).embeddings, expected, rtol=0, atol=1e-5)
    opened.save_pretrained(str(tmp_path))
    processor.save_pretrained(str(tmp_path))
    again = AutoModel.from_pretrained(str(tmp_path))
    assert again.config.options["latent_steps"] == 2
    assert torch.equal(again(**batch).embeddings, opened(**batch).embeddings)
    assert type(AutoProcessor.from_pretrained(str(tmp_path))) is PlumeProcessor
    disc = AutoModel.from_pretrained(str(folder), mode="disc")
    expected = model.encode([{"text": text} for text in texts], mode="disc")
    assert torch.allclose(disc(**batch).embeddings, expected, rtol=0, atol=1e-5)
    assert disc.config.options["mode"] == "disc"


def test_options_of_folders_written_before_there_were_families_count(folder, texts, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plume" / "ume.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["options"]
    raw |= {"mode": "gen", "latent_steps": 2, "context": "none", "top_k": 1}
    raw |= {"multi_image": None, "min_pixels": 784, "max_pixels": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    opened = AutoModel.from_pretrained(str(tmp_path), latent_steps=3)
    batch = AutoProcessor.from_pretrained(str(tmp_path))(texts)
    expected = ume_models.load(latent_steps=3, context="none", top_k=1)
    assert opened.config.options["max_pixels"] == 10_000
    rows = [{"text": text} for text in texts]
    assert torch.allclose(opened(**batch).embeddings, expected.encode(rows), rtol=0, atol=1e-5)


def test_dtype_and_device(folder):
    assert AutoModel.from_pretrained(str(folder), torch_dtype="bfloat16").dtype == torch.bfloat16
    opened = AutoModel.from_pretrained(str(folder), device_map={"": "cpu"})
    assert opened.to(torch.float64).to(torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="stays on one device"):
        AutoModel.from_pretrained(str(folder), device_map="balanced")


def test_a_plain_tokenizer_is_noticed(auto, texts):
    plain = AutoTokenizer.from_pretrained(str(tiny_checkpoint()))
    with pytest.raises(ValueError, match=r"row 0.*AutoProcessor"):
        auto(**plain(texts[:1], return_tensors="pt"))


def test_bad_calls_say_what_to_do(folder, auto, processor, image):
    with pytest.raises(UmeError, match="from_pretrained"):
        AutoModel.from_config(PlumeConfig())
    with pytest.raises(TypeError, match="quantization_config"):
        PlumeModel.from_pretrained(str(folder), quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        save_for_auto(None, tiny_checkpoint())
    with pytest.raises(CheckpointError, match="no such directory"):
        PlumeProcessor.from_pretrained("/no/such/folder")
    with pytest.raises(ValueError, match="truncation"):
        processor("a", truncation=True)
    with pytest.raises(ValueError, match="different numbers of rows"):
        processor(text=["a", "b"], images=[image])
    with pytest.raises(ItemError, match=r"item 1 .*is empty"):
        processor(text=["a", " "])
    with pytest.raises(ItemError, match=r"item 1.*the prompt has"):
        processor(text=["a", "x y " * 20_000])
    batch = PlumeTokenizer.from_pretrained(str(folder))("a")
    with pytest.raises(ValueError, match="not both"):
        auto(**batch, pixel_values=torch.zeros(4, 1176))


def test_export_leaves_the_official_files_alone(folder):
    inner, outer = (json.loads((folder / p / "config.json").read_text()) for p in ("plume", ""))
    assert inner["model_type"] == "qwen2_vl"
    assert outer["model_type"] == "ume_plume" and outer["checkpoint"] == "plume"
