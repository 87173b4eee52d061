"""Command-line arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ModelArguments:
    model_name: str = ""
    model_backbone: str = "qwen2_vl"
    max_new_tokens: int = 8
    attention: str = field(
        default="sdpa", metadata={"help": "the official script: flash-attention"}
    )
    dtype: str = field(default="float32", metadata={"help": "the official script: bfloat16"})


@dataclass
class DataArguments:
    dataset_config: str = ""
    data_basedir: str | None = None
    encode_output_path: str = ""


@dataclass
class TrainingArguments:
    per_device_eval_batch_size: int = 2
    dataloader_num_workers: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
