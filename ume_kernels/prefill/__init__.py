"""Norm, rotary embedding with cache append, and SwiGLU gate of packed tokens."""

from ume_kernels.prefill.op import rms_norm, rope_append, silu_mul, silu_mul_

__all__ = ["rms_norm", "rope_append", "silu_mul", "silu_mul_"]
