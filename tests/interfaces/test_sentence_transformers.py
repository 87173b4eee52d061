"""With the real library."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import ume_models
from ume_models.assets import tiny_checkpoint
from ume_models.errors import ItemError
from ume_models.interfaces import sentence_transformer

library = pytest.importorskip(
    "sentence_transformers", minversion="5.4", exc_type=ImportError, reason="needs it at 5.4"
)
pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def opened():
    return library.SentenceTransformer(str(tiny_checkpoint()), device="cpu", trust_remote_code=True)


def close(found, expected):
    return np.allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_bundled_folder_opens_and_gives_the_same_numbers(opened, model, texts, items):
    found = opened.encode(texts)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert close(found, model.encode([{"text": text} for text in texts]))
    # its own batching and sorting included
    assert close(opened.encode(items, batch_size=3), model.encode(items))
    assert opened.get_embedding_dimension() == model.hidden_size
    assert opened.encode("a").shape == (model.hidden_size,)


def test_encode_options(opened, model, texts):
    rows = model.encode([{"text": text} for text in texts])
    tensor = opened.encode(
        texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )
    assert close(tensor.numpy(), rows)
    assert np.allclose(opened.similarity(tensor, tensor), rows @ rows.T, atol=1e-5)
    assert opened.encode(texts, truncate_dim=16).shape == (3, 16)
    two = opened.encode(texts, latent_steps=2)
    assert close(two, model.encode([{"text": text} for text in texts], latent_steps=2))
    with pytest.raises(ValueError, match="latent_stepz"):
        opened.encode(texts, latent_stepz=2)


def test_prompts(model, texts, image, tmp_path):
    wrapped = sentence_transformer(model, prompts={"query": "Find: ", "document": ""})
    asked = model.encode([{"text": f"Find: {text}"} for text in texts])
    for found in (
        wrapped.encode_query(texts),
        wrapped.encode(texts, prompt_name="query"),
        wrapped.encode(texts, prompt="Find: "),
    ):
        assert close(found, asked)
    plain = model.encode([{"text": text} for text in texts])
    assert close(wrapped.encode_document(texts), plain)
    mixed = ["a", Image.open(image), {"image": image, "text": "b"}]
    expected = [
        {"text": "Find: a"},
        {"image": image, "text": "Find: "},
        {"image": image, "text": "Find: b"},
    ]
    assert close(wrapped.encode(mixed, prompt_name="query"), model.encode(expected))

    wrapped.save_pretrained(str(tmp_path))
    again = library.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert close(again.encode_query(texts), asked)
    # both ways to open a folder find the prompts
    assert close(sentence_transformer(tmp_path, device="cpu").encode_query(texts), asked)
    assert ume_models.load(tmp_path).fingerprint == model.fingerprint


def test_loading_options(texts, model):
    opened = library.SentenceTransformer(
        str(tiny_checkpoint()),
        device="cpu",
        trust_remote_code=True,
        model_kwargs={"latent_steps": 3, "mode": "gen"},
    )
    assert close(opened.encode(texts), model.encode([{"text": t} for t in texts], latent_steps=3))
    with pytest.raises(TypeError, match="takes no load options"):
        sentence_transformer(model, min_pixels=784)
    wrapped = sentence_transformer(model, latent_steps=3)
    assert close(wrapped.encode(texts), opened.encode(texts, convert_to_tensor=True))


def test_bad_input_names_the_item(opened):
    with pytest.raises(ItemError, match=r"unknown field 'txt'.*\{'txt': 'b'\}"):
        opened.encode(["a longer text", {"txt": "b"}])
    with pytest.raises(ItemError, match="nothing is truncated"):
        opened.encode(["a", "x y " * 20_000])
