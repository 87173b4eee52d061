"""InfoNCE over a similarity matrix that is never stored, on one device or across a group."""

from ume_kernels.contrastive_loss.distributed import distributed_contrastive_loss
from ume_kernels.contrastive_loss.op import contrastive_loss
from ume_kernels.contrastive_loss.reference import contrastive_loss_reference
from ume_kernels.contrastive_loss.stats import ContrastiveStats

__all__ = [
    "ContrastiveStats",
    "contrastive_loss",
    "contrastive_loss_reference",
    "distributed_contrastive_loss",
]
