"""y = x Wᵀ + b, with a native CPU kernel for few rows of bf16 or fp32."""

from ume_kernels.linear.op import linear

__all__ = ["linear"]
