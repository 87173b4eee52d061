"""From embeddings to rankings: exact and faiss indexes, ranking quality, HTML galleries."""

from ume_models.retrieval.exact import ExactIndex
from ume_models.retrieval.faiss_index import FaissIndex
from ume_models.retrieval.local import local_search
from ume_models.retrieval.metrics import RankingQuality, ranking_quality
from ume_models.retrieval.protocol import Index, SearchResult

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "Index",
    "RankingQuality",
    "SearchResult",
    "local_search",
    "ranking_quality",
]
