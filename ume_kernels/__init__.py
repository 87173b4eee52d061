"""Kernels for universal multimodal embedders: tensors in, tensors out."""

from ume_kernels.contrastive_loss import contrastive_loss, distributed_contrastive_loss
from ume_kernels.decode import (
    DecoderLayerWeights,
    DecodeStep,
    LayerShape,
    attend_cache,
    decode_layer,
    decode_step,
    rope_table,
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
    "attend_cache",
    "contrastive_loss",
    "decode_layer",
    "decode_step",
    "distributed_contrastive_loss",
    "explain",
    "linear",
    "moe_transition",
    "rope_table",
    "similarity_topk",
]
