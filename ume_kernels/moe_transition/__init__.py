"""Mixture-of-experts latent transition (PLUME eq. 4-6)."""

from ume_kernels.moe_transition.module import MoETransition
from ume_kernels.moe_transition.op import moe_transition
from ume_kernels.moe_transition.reference import moe_transition_reference
from ume_kernels.moe_transition.weights import MoEWeights, SharedExpert

__all__ = [
    "MoETransition",
    "MoEWeights",
    "SharedExpert",
    "moe_transition",
    "moe_transition_reference",
]
