"""Kernels for universal multimodal embedders: tensors in, tensors out."""

from ume_kernels.decode import (
    DecoderLayerWeights,
    DecodeStep,
    LayerShape,
    decode_layer,
    decode_step,
)
from ume_kernels.dispatch import Backend, explain
from ume_kernels.linear import linear
from ume_kernels.moe_transition import MoETransition, MoEWeights, moe_transition
from ume_kernels.similarity_topk import similarity_topk

__all__ = [
    "Backend",
    "DecodeStep",
    "DecoderLayerWeights",
    "LayerShape",
    "MoETransition",
    "MoEWeights",
    "decode_layer",
    "decode_step",
    "explain",
    "linear",
    "moe_transition",
    "similarity_topk",
]
