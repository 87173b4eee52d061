"""Every interface with models of other families than the bundled one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer

import ume_models
from ume_models.embedders.registry import families, profiles
from ume_models.interfaces import (
    MtebEncoder,
    UmeEmbeddings,
    register_auto_classes,
    save_for_auto,
)
from ume_models.interfaces.sentence_transformers import EmbedderModule

pytestmark = pytest.mark.compat
CHECKPOINT = Path(__file__).parent.parent / "conformance" / "family_seen" / "checkpoint"
FAMILIES = [(f, p) for f in families() for p in profiles(f) if f != "plume"]


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def other(request):
    family, profile = request.param
    return ume_models.load(CHECKPOINT, family=family, profile=profile)


@pytest.fixture(scope="module")
def rows(image):
    return [{"text": "a red circle"}, {"text": "the digit seven"}, {"text": "b", "image": image}]


@pytest.fixture(scope="module")
def expected(other, rows):
    return other.encode(rows)


def close(found, wanted):
    return np.allclose(torch.as_tensor(found), wanted, rtol=0, atol=1e-5)


def test_sentence_transformers(other, rows, expected, tmp_path):
    module = EmbedderModule(other)
    module.save(str(tmp_path))
    for opened in (module, EmbedderModule.load(str(tmp_path))):
        assert opened.embedder.profile.name == other.profile.name
        assert close(opened(opened.preprocess(rows))["sentence_embedding"], expected)
    assert set(module.forward_kwargs) == set(other.Options.names())


def test_text_embeddings_and_mteb(other, rows, expected):
    texts = [row["text"] for row in rows[:2]]
    assert close(UmeEmbeddings(other).embed_documents(texts), expected[:2])
    encoder = MtebEncoder(other)
    assert close(encoder.encode([{"text": texts}]), expected[:2])


def test_auto_classes(other, rows, expected, tmp_path):
    register_auto_classes()
    folder = str(save_for_auto(other, tmp_path))
    model = AutoModel.from_pretrained(folder)
    assert model.embedder.fingerprint == other.fingerprint
    assert close(model(**AutoProcessor.from_pretrained(folder)(items=rows)).embeddings, expected)
    batch = AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows[:2]])
    assert ("blank_images" in batch) == other.processor.template.blank_image
    assert close(model(**batch).embeddings, expected[:2])
