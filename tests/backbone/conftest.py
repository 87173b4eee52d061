"""A Qwen2.5-VL checkpoint with random weights: the recordings are of Qwen2-VL only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ume_kernels import MoETransition
from ume_models.backbone.config import parse_config
from ume_models.embedders.plume import PlumeForEmbedding

VISION_25 = {
    "model_type": "qwen2_5_vl",
    "depth": 3,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 4,
    "hidden_act": "silu",
    "in_channels": 3,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}


@pytest.fixture(scope="session")
def qwen25_checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Path:
    target = tmp_path_factory.mktemp("qwen25") / "checkpoint"
    shutil.copytree(checkpoint_dir, target)
    raw = json.loads((target / "config.json").read_text())
    raw |= {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": VISION_25,
    }
    (target / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    torch.manual_seed(0)
    model = PlumeForEmbedding(config, MoETransition(128), tied=True)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target
