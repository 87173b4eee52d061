"""PLUME as the embedding object of LangChain and LlamaIndex: plain lists of floats."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ume_models.embedders.loading import load
from ume_models.embedders.plume import PlumeForEmbedding
from ume_models.encode import encode
from ume_models.errors import ItemError
from ume_models.processing.items import MediaSource

Vector = list[float]
Result = TypeVar("Result")

# A model's arena belongs to one call at a time, however many objects share the model.
_LOCKS: weakref.WeakKeyDictionary[PlumeForEmbedding, threading.Lock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


class UmeEmbeddings:
    """Embeds texts and images with the methods LangChain and LlamaIndex call.

    Neither library is needed. Code that insists on their classes gets them from
    :meth:`as_langchain` and :meth:`as_llama_index`. Calls from several threads are run one after
    the other; the ``a…`` methods run in a thread and do not block the event loop.

    Args:
        model: folder, hub id, a loaded model, or None for the bundled one.
        query_instruction: precedes queries, with one space between.
        document_instruction: precedes documents.
        image_instruction: accompanies images.
        encode_options: options of ``ume_models.encode.encode``, such as ``mode`` and
            ``batch_tokens``.
        load_options: options of ``ume_models.load``.

    Raises:
        CheckpointError: the checkpoint does not load.
    """

    def __init__(
        self,
        model: PlumeForEmbedding | str | Path | None = None,
        *,
        query_instruction: str = "",
        document_instruction: str = "",
        image_instruction: str = "",
        encode_options: dict[str, Any] | None = None,
        **load_options: Any,
    ) -> None:
        if isinstance(model, PlumeForEmbedding):
            if load_options:
                raise TypeError(f"a loaded model takes no load options, got {sorted(load_options)}")
            self.model = model
        else:
            self.model = load(model, **load_options)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self.image_instruction = image_instruction
        self.encode_options = {"progress": False, **(encode_options or {})}
        name = getattr(self.model, "sources", (Path("plume"),))[0].resolve().name
        self.model_name = f"{name}-{self.model.settings.latent_steps}"

    # -- LangChain --------------------------------------------------------------------------

    def embed_documents(self, texts: Sequence[str]) -> list[Vector]:
        """One unit vector per document.

        Raises:
            ItemError: a text is empty, too long or not a string; its position is named.
        """
        return self._texts(texts, self.document_instruction)

    def embed_query(self, text: str) -> Vector:
        """The unit vector of a query."""
        return self._texts([text], self.query_instruction)[0]

    def embed_image(self, uris: Sequence[MediaSource]) -> list[Vector]:
        """One unit vector per image: local paths, bytes or PIL images."""
        if isinstance(uris, (str, bytes)):
            raise TypeError("uris must be a list of images; put a single one into a list: [image]")
        instruction = self.image_instruction
        return self._encode({"image": uri, "instruction": instruction} for uri in uris)

    async def aembed_documents(self, texts: Sequence[str]) -> list[Vector]:
        """:meth:`embed_documents` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> Vector:
        """:meth:`embed_query` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_query, text)

    async def aembed_image(self, uris: Sequence[MediaSource]) -> list[Vector]:
        """:meth:`embed_image` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_image, uris)

    # -- LlamaIndex -------------------------------------------------------------------------

    def get_text_embedding(self, text: str) -> Vector:
        """The unit vector of a document."""
        return self.embed_documents([text])[0]

    def get_text_embedding_batch(
        self, texts: Sequence[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Vector]:
        """One unit vector per document."""
        return self._texts(texts, self.document_instruction, progress=show_progress)

    def get_query_embedding(self, query: str) -> Vector:
        """The unit vector of a query."""
        return self.embed_query(query)

    def get_agg_embedding_from_queries(
        self, queries: Sequence[str], agg_fn: Callable[[list[Vector]], Vector] | None = None
    ) -> Vector:
        """One vector for several queries: ``agg_fn`` of theirs, by default the mean."""
        return (agg_fn or _mean)(self._texts(queries, self.query_instruction))

    def get_image_embedding(self, img_file_path: MediaSource) -> Vector:
        """The unit vector of an image."""
        return self.embed_image([img_file_path])[0]

    def get_image_embedding_batch(
        self, img_file_paths: Sequence[MediaSource], show_progress: bool = False
    ) -> list[Vector]:
        """One unit vector per image."""
        return self.embed_image(img_file_paths)

    async def aget_text_embedding(self, text: str) -> Vector:
        """:meth:`get_text_embedding` without blocking the event loop."""
        return await asyncio.to_thread(self.get_text_embedding, text)

    async def aget_text_embedding_batch(
        self, texts: Sequence[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Vector]:
        """:meth:`get_text_embedding_batch` without blocking the event loop."""
        return await asyncio.to_thread(self.get_text_embedding_batch, texts, show_progress)

    async def aget_query_embedding(self, query: str) -> Vector:
        """:meth:`get_query_embedding` without blocking the event loop."""
        return await asyncio.to_thread(self.get_query_embedding, query)

    async def aget_agg_embedding_from_queries(
        self, queries: Sequence[str], agg_fn: Callable[[list[Vector]], Vector] | None = None
    ) -> Vector:
        """:meth:`get_agg_embedding_from_queries` without blocking the event loop."""
        return await asyncio.to_thread(self.get_agg_embedding_from_queries, queries, agg_fn)

    async def aget_image_embedding(self, img_file_path: MediaSource) -> Vector:
        """:meth:`get_image_embedding` without blocking the event loop."""
        return await asyncio.to_thread(self.get_image_embedding, img_file_path)

    async def aget_image_embedding_batch(
        self, img_file_paths: Sequence[MediaSource], show_progress: bool = False
    ) -> list[Vector]:
        """:meth:`get_image_embedding_batch` without blocking the event loop."""
        return await asyncio.to_thread(self.get_image_embedding_batch, img_file_paths)

    # -- their own classes ------------------------------------------------------------------

    def as_langchain(self) -> Any:
        """The same as a ``langchain_core.embeddings.Embeddings``, for code that checks the class.

        Raises:
            ImportError: langchain-core is not installed.
        """
        try:
            from langchain_core.embeddings import Embeddings
        except ImportError as error:
            raise ImportError("this needs langchain-core: pip install langchain-core") from error
        if isinstance(self, Embeddings):
            return self
        combined = type("LangChainUmeEmbeddings", (type(self), Embeddings), {})
        return _view(self, combined)

    def as_llama_index(self) -> Any:
        """A ``llama_index.core`` ``MultiModalEmbedding`` over this object, for ``embed_model=``.

        Raises:
            ImportError: llama-index-core is not installed.
        """
        from ume_models.interfaces.llama_index import make_embedding

        return make_embedding(self)

    # -- embedding --------------------------------------------------------------------------

    def _texts(self, texts: Sequence[str], instruction: str, **options: Any) -> list[Vector]:
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts must be a list of strings; put a single one into a list: [text]")
        items = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ItemError(f"must be a string, got {type(text).__name__}", index)
            # An instruction would hide that there is nothing to embed.
            if not text.strip():
                raise ItemError("is an empty text; leave it out", index)
            items.append({"text": text, "instruction": instruction})
        return self._encode(items, **options)

    def _encode(self, items: Iterable[dict[str, Any]], **options: Any) -> list[Vector]:
        with _lock_of(self.model):
            vectors = encode(self.model, items, **{**self.encode_options, **options})
        found: list[Vector] = vectors.tolist()
        return found


def _view(source: UmeEmbeddings, cls: type) -> Any:
    """An object of another class with the same content."""
    view: Any = object.__new__(cls)
    view.__dict__.update(source.__dict__)
    return view


def _lock_of(model: PlumeForEmbedding) -> threading.Lock:
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.Lock())


def _mean(vectors: list[Vector]) -> Vector:
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]
