"""Small transformers models with random weights, built from configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
IMAGE, VIDEO = 110, 111
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}
_VISION_BOTH = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}

Build = Callable[..., Any]


def build_model(
    family: str = "qwen2_vl",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Any:
    """``…ForConditionalGeneration`` in evaluation mode."""
    import transformers

    name = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **_TEXT,
        vision_config={**_VISION_BOTH, **_VISION[family]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=112,
        vision_end_token_id=113,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.device(device):
        model = kind._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        # The published initialisation is so small that a hidden token would hardly be seen.
        if parameter.dim() > 1 and not parameter.is_meta:
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param)


def decoder(model: Any) -> Any:
    """The module that holds the decoder layers."""
    return next(m for m in model.modules() if "layers" in m._modules and "norm" in m._modules)


@pytest.fixture
def text_of() -> Callable[[Any], Any]:
    return decoder


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two rows: an image and text each, the second one padded on the left."""
    torch.manual_seed(1)
    picture = [112, *[IMAGE] * 6, 113]
    rows = [[0, 0, 0, 5, *picture, 7, 8], [3, 4, 5, 6, *picture, 9, 10]]
    ids = torch.tensor(rows)
    given = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(48, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]]),
    }
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given


@pytest.fixture
def world() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
