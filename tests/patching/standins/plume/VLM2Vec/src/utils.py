"""Printing by rank, and moving batches."""

import logging

import torch

logger = logging.getLogger(__name__)


def print_rank(message):
    if torch.distributed.is_initialized():
        message = f"rank{torch.distributed.get_rank()}: {message}"
    logger.info(message)


def print_master(message):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(message)


def batch_to_device(batch, device):
    moved = {}
    for key, value in batch.items():
        moved[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    return moved
