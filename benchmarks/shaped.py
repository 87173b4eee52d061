"""Models of published shapes with random weights, and inputs with realistic token counts.

Speed does not depend on the values of the weights, so no checkpoint is needed. The tokenizer
is trained on the prompt and the benchmark's words until every word is one token, which gives
the counts of the published tokenizer on English text.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ume_kernels import MoETransition
from ume_models.backbone.config import parse_config
from ume_models.embedders.base import EngineName
from ume_models.embedders.plume import PlumeForEmbedding, PlumeOptions
from ume_models.embedders.plume_prompt import GENERATION_PROMPT, PREFIX, SUFFIX
from ume_models.processing import ImageConfig, Processor

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")
WORDS = (  # noqa: SIM905
    "a photo of the red car parked near old house with green door while people walk across "
    "busy street on sunny day in city market selling fresh fruit and bread"
).split()

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151662,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}


def _small(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, sections: list[int]
) -> dict[str, Any]:
    """The 2B model made smaller, for checks and dry runs; no published model has this shape."""
    return {
        **SHAPES["qwen2-vl-2b"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 5120,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": {
            **SHAPES["qwen2-vl-2b"]["vision_config"],
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": hidden,
            "num_heads": 4,
        },
    }


SHAPES["small"] = _small(768, 2048, 6, 6, 2, [16, 24, 24])
SHAPES["tiny"] = _small(64, 96, 2, 4, 2, [2, 3, 3])


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [GENERATION_PROMPT, PREFIX, SUFFIX, " ".join(WORDS), "system\nuser\nassistant\n"]
    core.train_from_iterator([*corpus, "You are a helpful assistant.", *WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(list(ADDED))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights, drawn once and repeated: generating billions would take minutes."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 24, generator=generator).mul_(0.02)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "layernorm" in name or name.endswith(("norm.weight", "ln.weight")):
            flat.fill_(1.0)
            continue
        for start in range(0, flat.numel(), pool.numel()):
            part = flat[start : start + pool.numel()]
            part.copy_(pool[: part.numel()])


def shaped_model(
    shape: str = "qwen2-vl-2b",
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
    device: str = "cpu",
) -> PlumeForEmbedding:
    """A ``PlumeForEmbedding`` of a published shape with random weights.

    Args:
        shape: key of ``SHAPES``.
        dtype: type of the weights.
        layers: keep only so many decoder layers and vision blocks (quick checks).
        device: where to put it.
    """
    tokenizer = _tokenizer()
    raw = dict(SHAPES[shape])
    vocabulary = tokenizer.get_vocab()
    raw["image_token_id"] = vocabulary["<|image_pad|>"]
    raw["video_token_id"] = vocabulary["<|video_pad|>"]
    if layers is not None:
        raw["num_hidden_layers"] = layers
        raw["vision_config"] = {**raw["vision_config"], "depth": layers}
    config = parse_config(raw)
    with torch.device("meta"):
        adapter = MoETransition(config.hidden_size)
        model = PlumeForEmbedding(config, adapter, tied=True).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    _fill(model, seed=0)
    assert model.latent_moe_transition is not None
    model.latent_moe_transition._router_exclude_mask.zero_()
    profile = PlumeForEmbedding.profiles["official"]
    rules = replace(profile.rules, multi_image="all")
    processor = Processor(tokenizer, profile.template(tokenizer), ImageConfig(), rules)
    model.attach(tokenizer, processor, profile, PlumeOptions())
    return model


def with_engine(model: PlumeForEmbedding, engine: EngineName) -> PlumeForEmbedding:
    """The same model, weights shared, running on the other engine."""
    model.engine = engine
    return model


def text_items(count: int, words: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Captions of about ``words`` tokens."""
    rng = random.Random(seed)
    return [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(words - 4, words + 4)))}
        for _ in range(count)
    ]


def image_items(count: int, tokens: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Noise images of ``tokens`` merged visual tokens (a square number) with a short question."""
    side = 28 * int(tokens**0.5)
    rng = np.random.default_rng(seed)
    return [
        {
            "text": "a photo of people on the street",
            "image": Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)),
        }
        for _ in range(count)
    ]


def video_items(count: int, tokens: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Clips of eight noise frames; each pair of frames is ``tokens`` (a square) visual tokens."""
    side = 28 * int(tokens**0.5)
    rng = np.random.default_rng(seed)
    return [
        {
            "text": "a photo of people on the street",
            "video": [
                Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
                for _ in range(8)
            ],
        }
        for _ in range(count)
    ]


def page_items(count: int, tokens: int = 1024, seed: int = 0) -> list[dict[str, Any]]:
    """Document pages: dark lines on white, ``tokens`` (a square number) visual tokens."""
    side = 28 * int(tokens**0.5)
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        page = np.full((side, side, 3), 255, dtype=np.uint8)
        for top in range(8, side - 8, 14):
            page[top : top + 5, 8 : int(rng.integers(side // 2, side - 8))] = rng.integers(0, 90)
        made.append({"text": "a page of the old house", "image": Image.fromarray(page)})
    return made
