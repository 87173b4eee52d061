"""Kernels for universal multimodal embedders: tensors in, tensors out."""

from ume_kernels.decode import DecoderLayerWeights, LayerShape, decode_layer
from ume_kernels.dispatch import Backend, explain
from ume_kernels.linear import linear
from ume_kernels.moe_transition import MoETransition, MoEWeights, moe_transition
from ume_kernels.similarity_topk import similarity_topk

__all__ = [
    "Backend",
    "DecoderLayerWeights",
    "LayerShape",
    "MoETransition",
    "MoEWeights",
    "decode_layer",
    "explain",
    "linear",
    "moe_transition",
    "similarity_topk",
]
