"""Exact top-k by inner product: ties go to the lowest index, the scores are never stored."""

from ume_kernels.similarity_topk.op import similarity_topk
from ume_kernels.similarity_topk.reference import similarity_topk_reference

__all__ = ["similarity_topk", "similarity_topk_reference"]
