"""KV-cached decoder-layer step for a few new tokens per row."""

from ume_kernels.decode.op import attend_cache, decode_layer
from ume_kernels.decode.reference import (
    DecodeStep,
    attend_cache_reference,
    decode_layer_reference,
    decode_step,
    rope_table,
)
from ume_kernels.decode.weights import DecoderLayerWeights, LayerShape

__all__ = [
    "DecodeStep",
    "DecoderLayerWeights",
    "LayerShape",
    "attend_cache",
    "attend_cache_reference",
    "decode_layer",
    "decode_layer_reference",
    "decode_step",
    "rope_table",
]
