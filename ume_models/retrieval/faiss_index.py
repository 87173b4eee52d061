"""Search through faiss, for collections where scoring every candidate takes too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ume_models.errors import UmeError
from ume_models.retrieval.embedding_table import EmbeddingTable, listed
from ume_models.retrieval.exact import search_table
from ume_models.retrieval.protocol import SearchResult


class FaissIndex:
    """Inner-product search by any faiss factory string.

    The order of equal scores is faiss's own. A search among given candidates is answered exactly
    and without faiss, whose structures do not help there. The files hold the embeddings and the
    factory string, and the structure is built again on loading: faiss's own format is a binary
    dump that is not safe to read from strangers.

    Args:
        embeddings: ``[N, D]``; widened to float32.
        ids: N ids, in any sequence.
        duplicates: ``"keep"`` lets an id stand for several rows.
        factory: faiss index factory string: "Flat" (exact), "HNSW32", "IVF256,Flat", …
        gpu: search on all CUDA devices, a copy on each; building stays on the CPU.

    Raises:
        UmeError: faiss is not installed, or without the GPU asked for, or it refuses the factory
            string.
        ValueError: the sizes do not agree, an id stands twice or an embedding is not finite.
    """

    kind = "faiss"

    def __init__(
        self,
        embeddings: torch.Tensor,
        ids: Iterable[str],
        factory: str = "Flat",
        *,
        duplicates: Literal["refuse", "keep"] = "refuse",
        gpu: bool = False,
    ) -> None:
        faiss = import_faiss(gpu=gpu)
        self._table = EmbeddingTable(embeddings, listed(ids), duplicates=duplicates)
        self._factory = factory
        self._place = "the GPUs" if gpu else "the CPU"
        vectors = embeddings.detach().float().cpu().contiguous().numpy()
        try:
            self._index = faiss.index_factory(self.dim, factory, faiss.METRIC_INNER_PRODUCT)
            self._index.train(vectors)
            self._index.add(vectors)
            if gpu:
                self._index = faiss.index_cpu_to_all_gpus(self._index)
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

    @property
    def description(self) -> str:
        """What searches, in a few words."""
        return f"faiss {self._factory} on {self._place}"

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        allowed: torch.Tensor | None = None,
        candidates: Sequence[Sequence[str]] | None = None,
    ) -> SearchResult:
        """The ``k`` candidates faiss finds for each query ``[Q, D]``, best first.

        With ``allowed`` or ``candidates`` the search is that of ``ExactIndex``.

        Raises:
            ValueError: as ``ExactIndex.search``.
            UmeError: an approximate index found fewer than ``k``, or faiss cannot search as asked
                (on a GPU no more than 2048 results per query).
        """
        if allowed is not None or candidates is not None:
            return search_table(self._table, queries, k, allowed, candidates)
        queries, k = self._table.check_queries(queries, k)
        wanted = queries.detach().float().cpu().contiguous().numpy()
        try:
            scores, rows = self._index.search(wanted, k)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UmeError(f"faiss cannot find {k} per query: {reason}") from error
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
    def load(cls, directory: str | Path, *, gpu: bool = False) -> FaissIndex:
        """Read what ``save`` wrote and build the structure again, for GPUs if asked.

        Raises:
            StoreError: a file is damaged or of another kind of index.
            UmeError: as the constructor.
        """
        table, settings = EmbeddingTable.load(directory, cls.kind)
        factory = str(settings.get("factory", "Flat"))
        return cls(table.embeddings, table.ids, factory, duplicates="keep", gpu=gpu)


def import_faiss(*, gpu: bool = False) -> Any:
    """The faiss module.

    Raises:
        UmeError: it is not installed, or cannot use a GPU here; the message holds the command that
            installs it.
    """
    try:
        import faiss
    except ImportError as error:
        raise UmeError(
            f"the faiss index needs faiss, which cannot be imported ({error}); "
            "install it with: pip install faiss-cpu"
        ) from None
    if gpu and not hasattr(faiss, "StandardGpuResources"):
        raise UmeError(
            "this faiss is built without GPU support; install one that is: "
            "pip uninstall faiss-cpu && pip install faiss-gpu-cu12"
        )
    if gpu and faiss.get_num_gpus() == 0:
        raise UmeError("faiss finds no GPU")
    return faiss
