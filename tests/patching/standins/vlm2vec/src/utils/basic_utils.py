import torch


def print_master(message):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message)


def batch_to_device(batch, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
