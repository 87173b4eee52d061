"""Any model as the embedding object of LangChain and LlamaIndex: plain lists of floats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from ume_models.encode import encode
from ume_models.errors import ItemError
from ume_models.interfaces.models import Source, open_model
from ume_models.processing.items import MediaSource

Vector = list[float]
Result = TypeVar("Result")
Given = ParamSpec("Given")
Owner = TypeVar("Owner")


def _threaded(
    method: Callable[Concatenate[Owner, Given], Result],
) -> Callable[Concatenate[Owner, Given], Coroutine[Any, Any, Result]]:
    """A method that runs in a thread, without blocking the event loop."""

    @wraps(method)
    async def call(self: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        own = getattr(self, method.__name__)  # which a subclass may have replaced
        found: Result = await asyncio.to_thread(own, *args, **kwargs)
        return found

    return call


class UmeEmbeddings:
    """Embeds texts and images with the methods LangChain and LlamaIndex call.

    Neither library is needed. Code that insists on their classes gets them from
    :meth:`as_langchain` and :meth:`as_llama_index`. Calls from several threads compute one after
    the other; the ``a…`` methods run in a thread and do not block the event loop.

    Args:
        model, options: see ``interfaces.models.open_model``.
        query_instruction: precedes queries, with one space between.
        document_instruction: precedes documents.
        image_instruction: accompanies images.
        encode_options: options of ``ume_models.encode.encode``, such as ``batch_tokens``.

    Raises:
        CheckpointError: the checkpoint does not load.
    """

    def __init__(
        self,
        model: Source = None,
        *,
        query_instruction: str = "",
        document_instruction: str = "",
        image_instruction: str = "",
        encode_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model, chosen = open_model(model, options)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self.image_instruction = image_instruction
        self.encode_options = {"progress": False, **vars(chosen), **(encode_options or {})}
        own = {name: self.encode_options[name] for name in self.model.Options.names()}
        described = self.model.options.replaced(own).described()
        # Caches of both libraries go by the name.
        name = [self.model.sources[0].resolve().name, self.model.profile.name]
        self.model_name = "-".join([*name, *(f"{key}={value}" for key, value in described.items())])

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

    aembed_documents = _threaded(embed_documents)
    aembed_query = _threaded(embed_query)
    aembed_image = _threaded(embed_image)

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

    aget_text_embedding = _threaded(get_text_embedding)
    aget_text_embedding_batch = _threaded(get_text_embedding_batch)
    aget_query_embedding = _threaded(get_query_embedding)
    aget_agg_embedding_from_queries = _threaded(get_agg_embedding_from_queries)
    aget_image_embedding = _threaded(get_image_embedding)
    aget_image_embedding_batch = _threaded(get_image_embedding_batch)

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
        vectors = encode(self.model, items, **{**self.encode_options, **options})
        found: list[Vector] = vectors.tolist()
        return found


def _view(source: UmeEmbeddings, cls: type) -> Any:
    """An object of another class with the same content."""
    view: Any = object.__new__(cls)
    view.__dict__.update(source.__dict__)
    return view


def _mean(vectors: list[Vector]) -> Vector:
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]
