"""Stand-in for VLM2Vec's losses on representations."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


class SimpleContrastiveLoss:
    def __init__(self, temperature=0.02):
        self.temperature = temperature

    def __call__(self, x, y, target=None, reduction="mean"):
        if target is None:
            step = y.size(0) // x.size(0)
            target = torch.arange(0, x.size(0) * step, step, device=x.device, dtype=torch.long)
        logits = torch.matmul(x, y.transpose(0, 1))
        return F.cross_entropy(logits / self.temperature, target, reduction=reduction)


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    def __init__(self, n_target=0, scale_loss=True, temperature=0.02):
        assert dist.is_initialized(), "Distributed training has not been properly initialized."
        super().__init__()
        self.word_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.scale_loss = scale_loss
        self.temperature = temperature

    def __call__(self, x, y, **kwargs):
        loss = super().__call__(self.gather_tensor(x), self.gather_tensor(y), **kwargs)
        return loss * self.word_size if self.scale_loss else loss

    def gather_tensor(self, t):
        gathered = [torch.empty_like(t) for _ in range(self.word_size)]
        dist.all_gather(gathered, t)
        gathered[self.rank] = t
        return torch.cat(gathered, dim=0)


class InExampleContrastiveLoss:
    def __init__(self, n_hard_negatives=0, temperature=1.0, ndim=None, *args, **kwargs):
        self.target_per_qry = n_hard_negatives + 1
        self.temperature = temperature

    def __call__(self, x, y, reduction="mean"):
        logits = torch.einsum("bd,bsd->bs", x, y) * self.temperature
        target = torch.zeros(len(x), dtype=torch.long, device=x.device)
        loss = F.cross_entropy(logits, target, reduction=reduction)
        return loss, {"logits": logits, "labels": target, "preds": logits.argmax(-1)}
