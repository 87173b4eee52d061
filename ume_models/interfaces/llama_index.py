"""A LlamaIndex embedding around ``UmeEmbeddings``; imported when it is asked for."""

from __future__ import annotations

from typing import Any

Vector = list[float]


def make_embedding(embeddings: Any) -> Any:
    """A ``MultiModalEmbedding`` that asks ``embeddings``, a ``UmeEmbeddings``.

    Raises:
        ImportError: llama-index-core is not installed.
    """
    try:
        from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
        from pydantic import PrivateAttr
    except ImportError as error:
        raise ImportError("this needs llama-index-core: pip install llama-index-core") from error

    class UmeEmbedding(MultiModalEmbedding):
        _source: Any = PrivateAttr()

        @classmethod
        def class_name(cls) -> str:
            return "UmeEmbedding"

        def _get_text_embedding(self, text: str) -> Vector:
            return self._source.get_text_embedding(text)

        def _get_text_embeddings(self, texts: list[str]) -> list[Vector]:
            return self._source.get_text_embedding_batch(texts)

        def _get_query_embedding(self, query: str) -> Vector:
            return self._source.get_query_embedding(query)

        def _get_image_embedding(self, img_file_path: Any) -> Vector:
            return self._source.get_image_embedding(_image(img_file_path))

        def _get_image_embeddings(self, img_file_paths: list[Any]) -> list[Vector]:
            return self._source.embed_image([_image(path) for path in img_file_paths])

        async def _aget_text_embedding(self, text: str) -> Vector:
            return await self._source.aget_text_embedding(text)

        async def _aget_text_embeddings(self, texts: list[str]) -> list[Vector]:
            return await self._source.aget_text_embedding_batch(texts)

        async def _aget_query_embedding(self, query: str) -> Vector:
            return await self._source.aget_query_embedding(query)

        async def _aget_image_embedding(self, img_file_path: Any) -> Vector:
            return await self._source.aget_image_embedding(_image(img_file_path))

        async def _aget_image_embeddings(self, img_file_paths: list[Any]) -> list[Vector]:
            paths = [_image(path) for path in img_file_paths]
            return await self._source.aget_image_embedding_batch(paths)

    made = UmeEmbedding(model_name=embeddings.model_name, embed_batch_size=64)
    made._source = embeddings
    return made


def _image(source: Any) -> Any:
    """The bytes of LlamaIndex's in-memory images, anything else as it is."""
    return source.getvalue() if hasattr(source, "getvalue") else source
