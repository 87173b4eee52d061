"""Search through faiss, for collections where scoring every candidate takes too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ume_models.errors import UmeError
from ume_models.retrieval.embedding_table import EmbeddingTable
from ume_models.retrieval.protocol import SearchResult


class FaissIndex:
    """Inner-product search by any faiss factory string.

    The order of equal scores is faiss's own. The files hold the embeddings and the factory
    string, and the structure is built again on loading: faiss's own format is a binary dump
    that is not safe to read from strangers.

    Args:
        embeddings: ``[N, D]``; widened to float32.
        ids: N ids.
        factory: faiss index factory string: "Flat" (exact), "HNSW32", "IVF256,Flat", …

    Raises:
        UmeError: faiss is not installed, or it refuses the factory string.
        ValueError: the sizes do not agree or an embedding is not finite.
    """

    kind = "faiss"

    def __init__(self, embeddings: torch.Tensor, ids: Sequence[str], factory: str = "Flat") -> None:
        faiss = import_faiss()
        self._table = EmbeddingTable(embeddings, ids)
        self._factory = factory
        vectors = embeddings.detach().float().cpu().contiguous().numpy()
        try:
            self._index = faiss.index_factory(self.dim, factory, faiss.METRIC_INNER_PRODUCT)
            self._index.train(vectors)
            self._index.add(vectors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UmeError(f"faiss cannot build {factory!r} here: {reason}") from error

    def __len__(self) -> int:
        return len(self._table.ids)

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the candidates, by row."""
        return self._table.ids

    @property
    def dim(self) -> int:
        """Columns D of the embeddings."""
        return self._table.embeddings.shape[1]

    def search(self, queries: torch.Tensor, k: int) -> SearchResult:
        """The ``k`` candidates faiss finds for each query ``[Q, D]``, best first.

        Raises:
            ValueError: a shape does not fit, ``k`` is out of range, or a query is not finite.
            UmeError: an approximate index found fewer than ``k``.
        """
        self._table.check_queries(queries, k)
        scores, rows = self._index.search(queries.detach().float().cpu().contiguous().numpy(), k)
        found = torch.from_numpy(rows)
        if bool((found < 0).any()):
            raise UmeError(
                f"the {self._factory!r} index found fewer than {k} candidates for a query: "
                "ask for fewer, or search the exact index"
            )
        return SearchResult(torch.from_numpy(scores), found, self._table.look_up(found))

    def save(self, directory: str | Path) -> None:
        """Write ``index.json`` and ``index.safetensors`` into ``directory``."""
        self._table.save(directory, self.kind, factory=self._factory)

    @classmethod
    def load(cls, directory: str | Path) -> FaissIndex:
        """Read what ``save`` wrote and build the structure again.

        Raises:
            StoreError: a file is damaged or of another kind of index.
            UmeError: faiss is not installed.
        """
        table, settings = EmbeddingTable.load(directory, cls.kind)
        return cls(table.embeddings, table.ids, str(settings.get("factory", "Flat")))


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UmeError: it is not installed; the message holds the command that installs it.
    """
    try:
        import faiss
    except ImportError as error:
        raise UmeError(
            f"the faiss index needs faiss, which cannot be imported ({error}); "
            "install it with: pip install faiss-cpu"
        ) from None
    return faiss
