"""Embedding objects of LangChain and LlamaIndex: duck-typed, and with the libraries themselves."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ume_models.errors import ItemError
from ume_models.interfaces import UmeEmbeddings


@pytest.fixture(scope="module")
def embeddings(model):
    return UmeEmbeddings(
        model, query_instruction="Find:", document_instruction="Text:", image_instruction="Image:"
    )


@pytest.fixture(scope="module")
def expected(model, texts, image):
    def encode(items):
        return model.encode(items).numpy()

    return {
        "documents": encode([{"text": text, "instruction": "Text:"} for text in texts]),
        "queries": encode([{"text": text, "instruction": "Find:"} for text in texts]),
        "image": encode([{"image": image, "instruction": "Image:"}]),
    }


def close(found, wanted):
    return np.allclose(np.array(found), wanted, rtol=0, atol=1e-5)


def test_langchain_methods(embeddings, expected, texts, image):
    found = embeddings.embed_documents(texts)
    assert isinstance(found, list) and type(found[0]) is list and type(found[0][0]) is float
    assert close(found, expected["documents"])
    assert close(embeddings.embed_query(texts[1]), expected["queries"][1])
    assert close(embeddings.embed_image([image]), expected["image"])
    assert embeddings.embed_documents([]) == []
    assert close(asyncio.run(embeddings.aembed_documents(texts)), expected["documents"])
    assert close(asyncio.run(embeddings.aembed_query(texts[1])), expected["queries"][1])
    assert close(asyncio.run(embeddings.aembed_image([Path(image)])), expected["image"])


def test_llama_index_methods(embeddings, expected, texts, image):
    documents, queries = expected["documents"], expected["queries"]
    assert close(embeddings.get_text_embedding(texts[0]), documents[0])
    assert close(embeddings.get_text_embedding_batch(texts), documents)
    assert close(embeddings.get_query_embedding(texts[0]), queries[0])
    assert close(embeddings.get_agg_embedding_from_queries(texts), queries.mean(0))
    last = embeddings.get_agg_embedding_from_queries(texts, lambda vectors: vectors[-1])
    assert close(last, queries[-1])
    assert close(embeddings.get_image_embedding(image), expected["image"][0])
    assert close(embeddings.get_image_embedding_batch([image]), expected["image"])

    async def all_of_them():
        return await asyncio.gather(
            embeddings.aget_text_embedding(texts[0]),
            embeddings.aget_text_embedding_batch(texts),
            embeddings.aget_query_embedding(texts[0]),
            embeddings.aget_agg_embedding_from_queries(texts),
            embeddings.aget_image_embedding(image),
            embeddings.aget_image_embedding_batch([image]),
        )

    wanted = (documents[0], documents, queries[0], queries.mean(0), *[expected["image"]] * 2)
    for found, right in zip(asyncio.run(all_of_them()), wanted, strict=True):
        assert close(found, right)


def test_threads_share_a_model(model, texts, expected):
    objects = [UmeEmbeddings(model, document_instruction="Text:") for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(objects[n % 2].embed_documents, texts) for n in range(12)]
        assert all(close(job.result(), expected["documents"]) for job in jobs)


def test_options_reach_the_model(model, texts):
    embeddings = UmeEmbeddings(model, encode_options={"mode": "disc"})
    wanted = model.encode([{"text": text} for text in texts], mode="disc").numpy()
    assert close(embeddings.embed_documents(texts), wanted)
    assert UmeEmbeddings(latent_steps=3).model.latent_steps == 3
    with pytest.raises(TypeError, match="takes no load options"):
        UmeEmbeddings(model, min_pixels=784)
    one, two = UmeEmbeddings(model, mode="disc"), UmeEmbeddings(model)
    assert close(one.embed_documents(texts), wanted) and one.model_name != two.model_name


def test_bad_input_names_the_item(embeddings):
    with pytest.raises(ItemError, match="item 1: is an empty text"):
        embeddings.embed_documents(["a", "  "])
    with pytest.raises(ItemError, match="item 1: must be a string, got int"):
        embeddings.embed_documents(["a", 3])
    with pytest.raises(TypeError, match="into a list"):
        embeddings.embed_documents("a")
    with pytest.raises(TypeError, match="into a list"):
        embeddings.embed_image("a.png")
    with pytest.raises(ItemError, match=r"item 0.*no-such\.png"):
        embeddings.embed_image(["no-such.png"])


def test_langchain_itself(embeddings, texts, expected):
    pytest.importorskip("langchain_core", exc_type=ImportError)
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    typed = embeddings.as_langchain()
    assert isinstance(typed, Embeddings) and typed.as_langchain() is typed
    for given in (embeddings, typed):
        store = InMemoryVectorStore(given)
        store.add_texts(texts)
        found = store.similarity_search_with_score(texts[2], k=3)
        scores = expected["documents"] @ expected["queries"][2]
        order = np.argsort(-scores)
        assert [document.page_content for document, _ in found] == [texts[n] for n in order]
        assert close([score for _, score in found], scores[order])
        assert asyncio.run(store.asimilarity_search(texts[2], k=1)) == [found[0][0]]


def test_llama_index_itself(embeddings, texts, expected, image):
    pytest.importorskip("llama_index.core", exc_type=ImportError)
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    typed = embeddings.as_llama_index()
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=typed)
    (best,) = index.as_retriever(similarity_top_k=1).retrieve(texts[2])
    scores = expected["documents"] @ expected["queries"][2]
    assert best.text == texts[int(scores.argmax())]
    assert best.score == pytest.approx(float(scores.max()), abs=1e-5)
    picture = io.BytesIO(Path(image).read_bytes())
    assert close(typed.get_image_embedding_batch([image, picture]), expected["image"][[0, 0]])
    assert close(asyncio.run(typed.aget_text_embedding_batch(texts)), expected["documents"])
