"""KV-cached decoder-layer step for a few new tokens per row."""

from ume_kernels.decode.op import decode_layer
from ume_kernels.decode.reference import DecodeStep, decode_layer_reference, decode_step
from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape

__all__ = [
    "DecodeStep",
    "DecoderLayerWeights",
    "LayerShape",
    "decode_layer",
    "decode_layer_reference",
    "decode_step",
]
