"""The mteb encoder: with batches as mteb makes them, and with mteb itself where it is installed."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ume_models.assets import heldout
from ume_models.errors import ItemError
from ume_models.interfaces import MtebEncoder


@pytest.fixture(scope="module")
def encoder(model):
    return MtebEncoder(model)


def loader(rows, batch_size=2):
    """Columns as lists, as mteb's own collate function gives them."""
    return DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=lambda batch: {name: [row[name] for row in batch] for name in batch[0]},
    )


def task(**fields):
    return SimpleNamespace(**{"name": "Tiny", "type": "Retrieval", "prompt": None, **fields})


def test_texts_and_images_row_by_row(encoder, model, texts, image):
    picture = Image.open(image)
    expected = model.encode([{"text": text} for text in texts]).numpy()
    found = encoder.encode(loader([{"text": text, "id": "x"} for text in texts]), batch_size=2)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
    # mteb 1: a list of texts
    assert np.allclose(encoder.encode(texts, task_name="Tiny"), expected, rtol=0, atol=1e-5)

    frames = torch.from_numpy(np.stack([np.asarray(picture)] * 2).transpose(0, 3, 1, 2).copy())
    for rows, items in (
        ([{"image": picture}] * 3, [{"image": image}] * 3),
        (
            [{"text": t, "image": picture} for t in texts],
            [{"text": t, "image": image} for t in texts],
        ),
        ([{"video": frames}], [{"video": [image, image]}]),
    ):
        found = encoder.encode(loader(rows))
        assert np.allclose(found, model.encode(items).numpy(), rtol=0, atol=1e-5)
    assert encoder.encode([]).shape == (0, model.hidden_size)


def test_the_most_specific_instruction_counts(model):
    general = {"query": "q", "document": "d", "Retrieval": "r", "Tiny": "t", "Tiny-query": "tq"}
    for keys, expected in (
        (("query", "document"), ("q", "d", "")),
        (("query", "Retrieval"), ("r", "r", "r")),
        (("Retrieval", "Tiny", "document"), ("t", "t", "t")),
        (("Tiny", "Tiny-query"), ("tq", "t", "t")),
        ((), ("own query", "", "")),
    ):
        encoder = MtebEncoder(model, instructions={key: general[key] for key in keys})
        described = task(prompt={"query": "own query"})
        sides = [
            encoder.instruction(described, side)
            for side in (SimpleNamespace(value="query"), "document", None)
        ]
        assert tuple(sides) == expected, keys
    assert MtebEncoder(model).instruction(task(prompt="both"), "passage") == "both"
    assert MtebEncoder(model, instructions={"document": "d"}).instruction(task(), "passage") == "d"
    made = MtebEncoder(model, instructions=lambda metadata, side: f"{metadata.name} {side}")
    assert made.instruction(task(), "query") == "Tiny query"


def test_instruction_precedes_the_text(model, texts):
    encoder = MtebEncoder(model, instructions={"query": "Find:"}, mode="disc")
    found = encoder.encode(loader([{"text": texts[0]}]), task_metadata=task(), prompt_type="query")
    expected = model.encode([{"text": texts[0], "instruction": "Find:"}], mode="disc")
    assert np.allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_similarity_is_the_cosine(encoder):
    generator = np.random.default_rng(0)
    one, two = generator.normal(size=(3, 5)), generator.normal(size=(3, 5))
    expected = (one @ two.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(two, axis=1)
    assert np.allclose(encoder.similarity(one, two), expected, atol=1e-6)
    assert np.allclose(encoder.similarity_pairwise(one, two), np.diag(expected), atol=1e-6)


def test_bad_input_names_the_item(encoder, texts):
    with pytest.raises(ItemError, match="item 3: is empty"):
        encoder.encode(loader([{"text": text} for text in (*texts, " ")]))
    # beyond the first group of media that is encoded at once
    clip = [Image.new("RGB", (28, 28))] * 100
    with pytest.raises(ItemError, match="item 4: is empty"):
        encoder.encode([{"video": [clip, clip, clip, None, None], "text": ["a"] * 4 + [" "]}])
    with pytest.raises(ItemError, match="item 0: has audio"):
        encoder.encode([{"audio": [np.zeros(4)], "text": ["a"]}])
    with pytest.raises(ItemError, match="only query"):
        encoder.encode([{"query": ["a"]}])
    with pytest.raises(ValueError, match="precision"):
        encoder.encode(texts, precision="int8")


def test_mteb_itself(encoder, model, monkeypatch):
    mteb = pytest.importorskip("mteb", minversion="2", exc_type=ImportError)
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import EncoderProtocol

    # It hashes tables by pickling them, which some versions of pyarrow do not support.
    monkeypatch.setattr(
        "datasets.arrow_dataset.generate_fingerprint", lambda dataset: uuid.uuid4().hex
    )
    scenes = next(task for task in heldout().tasks if task.name == "scene_t2i")

    class TinyScenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TinyScenes",
            dataset={"path": "none/none", "revision": "1"},
            description="scenes",
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
            reference=None,
            bibtex_citation="",
            **dict.fromkeys(
                ("date", "domains", "task_subtypes", "license", "annotations_creators")
            ),
            **dict.fromkeys(("dialect", "sample_creation")),
        )

        def load_data(self, **kwargs):
            queries = [{"id": item["id"], "text": item["text"]} for item in scenes.queries]
            corpus = {
                "id": [item["id"] for item in scenes.candidates],
                "image": [Image.open(item["image"]) for item in scenes.candidates],
            }
            pairs = zip(scenes.queries, scenes.relevant, strict=True)
            split = {
                "queries": datasets.Dataset.from_list(queries),
                "corpus": datasets.Dataset.from_dict(corpus),
                "relevant_docs": {item["id"]: dict.fromkeys(found, 1) for item, found in pairs},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    assert isinstance(encoder, EncoderProtocol)
    assert encoder.mteb_model_meta.revision == model.fingerprint
    result = mteb.evaluate(encoder, TinyScenes(), cache=None, show_progress_bar=False)

    scores = model.encode(scenes.queries) @ model.encode(scenes.candidates).T
    ids = [item["id"] for item in scenes.candidates]
    best = [
        ids[row] in set(found) for row, found in zip(scores.argmax(1), scenes.relevant, strict=True)
    ]
    assert result.task_results[0].get_score() == pytest.approx(sum(best) / len(best), abs=1e-4)
