"""Command-line arguments."""

from dataclasses import dataclass, field

import torch


@dataclass
class ModelArguments:
    model_name: str = field(metadata={"help": "checkpoint folder"})
    model_base: str = None
    model_type: str = None
    model_backbone: str = None
    checkpoint_path: str = None
    lora: bool = False
    max_new_tokens: int = 4096
    attn_implementation: str = "flash_attention_2"
    torch_dtype: str = "bfloat16"
    ported: bool = field(default=False, metadata={"help": "see README.md"})


@dataclass
class DataArguments:
    dataset_config: str = None
    data_basedir: str = None
    encode_output_path: str = None
    resize_min_pixels: int = 784
    resize_max_pixels: int = 2359296


@dataclass
class TrainingArguments:
    per_device_eval_batch_size: int = 1
    dataloader_num_workers: int = 0

    @property
    def device(self):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
