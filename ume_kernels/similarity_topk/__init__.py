"""Exact top-k by inner product: ties go to the lowest index, memory is bounded by chunks."""

from ume_kernels.similarity_topk.op import similarity_topk
from ume_kernels.similarity_topk.reference import similarity_topk_reference

__all__ = ["similarity_topk", "similarity_topk_reference"]
