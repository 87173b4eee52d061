"""Stand-in for the losses of the gradient cache that also return what they saw."""

import torch
import torch.nn.functional as F


class SimpleContrastiveLoss:
    def __init__(self, n_hard_negatives=0, temperature=1.0, *args, **kwargs):
        self.target_per_qry = n_hard_negatives + 1
        self.temperature = temperature

    def __call__(self, x, y, target=None, reduction="mean"):
        if target is None:
            assert x.size(0) * self.target_per_qry == y.size(0)
            target = torch.arange(0, y.size(0), step=self.target_per_qry, device=x.device)
        logits = torch.matmul(x, y.transpose(0, 1)) * self.temperature
        loss = F.cross_entropy(logits, target, reduction=reduction)
        return loss, {"logits": logits, "labels": target, "preds": logits.argmax(-1)}


LossName2LossCls = {"inbatch_contrastive": SimpleContrastiveLoss}
