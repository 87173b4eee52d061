"""The engine on a transformers model: same numbers, same parameters, nothing left on the model."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from ume_models.assets import tiny_checkpoint
from ume_models.patching import engine as engine_room
from ume_models.patching import versions
from ume_models.patching.engine import Engine, engine_for, rows_of_inputs
from ume_models.rollout.headers import Headers

pytestmark = pytest.mark.compat

IMAGE, START, END = 727, 725, 726
HEADER = [720, 40, 41, 42, 43, 44, 45, 46, 47, START]


def load(dtype: torch.dtype = torch.float32) -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint(), torch_dtype=dtype, attn_implementation="sdpa"
    ).eval()


@pytest.fixture(scope="module")
def shared() -> Any:
    return load()


@pytest.fixture
def model(shared: Any) -> Any:
    return copy.deepcopy(shared)


def sample(words: int, grid: tuple[int, int, int] | None, seed: int) -> dict[str, torch.Tensor]:
    """One row in processor layout: header, image (white where ``grid`` is None), text."""
    generator = torch.Generator().manual_seed(seed)
    blank = grid is None
    grid = grid or (1, 4, 4)
    patches = grid[0] * grid[1] * grid[2]
    pixels = torch.randn(patches, 1176, generator=generator)
    text = torch.randint(50, 700, (words,), generator=generator).tolist()
    ids = torch.tensor([[*HEADER, *[IMAGE] * (patches // 4), END, *text]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.ones(patches, 1176) if blank else pixels,
        "image_grid_thw": torch.tensor([grid]),
    }


def mixed() -> list[dict[str, torch.Tensor]]:
    return [
        sample(5, None, 0), sample(3, (1, 6, 4), 1), sample(11, None, 2), sample(4, (1, 4, 8), 3),
        sample(7, None, 4),
    ]  # fmt: skip


def official(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states ``[n, D]`` of the model itself."""
    extra = {}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        extra = {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
    with torch.no_grad():
        out = model(**inputs, **extra, output_hidden_states=True, return_dict=True)
    return out.hidden_states[-1][0]


def get(model: nn.Module) -> Engine:
    engine, reason = engine_for(model)
    assert engine is not None, reason
    return engine


def reason_of(model: nn.Module) -> str:
    engine, reason = engine_for(model)
    assert engine is None
    return reason


def check(model: Any, tolerance: float = 1e-5) -> None:
    """Hidden states of a ragged batch against the model's own."""
    batch = mixed()
    engine = get(model)
    rows = [engine.rows(inputs)[0] for inputs in batch]
    for tokens in ([-1] * 5, [12, -2, 15, -1, 16]):
        found = engine.hidden_at(rows, tokens)
        for row, inputs, token in zip(found, batch, tokens, strict=True):
            expected = official(model, inputs)[token]
            assert row.dtype == expected.dtype
            assert (row - expected).norm() <= tolerance * expected.norm()


def test_hidden_states_are_the_models_own(model: Any) -> None:
    check(model)


def test_the_parameters_are_the_models_own_and_nothing_is_left_on_it(model: Any) -> None:
    official(model, mixed()[0])  # transformers adds attributes of its own with the first call
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    check(model)
    view = get(model).view
    held = {id(p) for p in (*view.text.parameters(), *view.visual.parameters())}
    assert held == {id(p) for p in model.parameters()}
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]


def test_headers_are_learnt_bounded_and_change_no_number(model: Any) -> None:
    engine = get(model)
    batch = [engine.rows(inputs)[0] for inputs in mixed()]
    alone = torch.cat([engine.hidden_at([row], [-1]) for row in batch])
    torch.testing.assert_close(engine.hidden_at(batch, [-1] * 5), alone, atol=1e-5, rtol=1e-5)
    assert header_lengths(engine, batch) == [len(HEADER) + 5, len(HEADER)]  # white image; any image
    pairs = [sample(9, (1, 4, 4), seed // 2) for seed in range(40)]
    many = [engine.rows(inputs)[0] for inputs in pairs]
    assert 2 < len(header_lengths(engine, many)) <= 8
    found = engine.hidden_at(many, [-1] * 40)
    alone = torch.cat([engine.hidden_at([row], [-1]) for row in many])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def header_lengths(engine: Engine, rows: list[Any]) -> list[int]:
    """Lengths of the headers of a batch."""
    prompts = [engine.prompt(row) for row in rows]
    headers = Headers(engine.config, prompts, [len(prompt) - 1 for prompt in prompts])
    return [len(header.sequence) for header in headers._headers]


def test_an_image_with_the_same_grid_but_other_pixels_is_not_taken_for_the_header(
    model: Any,
) -> None:
    engine = get(model)
    white = [engine.rows(sample(n, None, n))[0] for n in (4, 6)]
    engine.hidden_at(white, [-1, -1])
    other = sample(5, (1, 4, 4), 7)
    found = engine.hidden_at(engine.rows(other), [-1])[0]
    expected = official(model, other)[-1]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_weights_changed_in_place_are_seen(model: Any) -> None:
    check(model)
    first = get(model)
    with torch.no_grad():
        model.lm_head.weight[:700].mul_(1.5)
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(0.7)
    assert get(model) is not first
    check(model)
    assert get(model) is get(model)


def test_weights_changed_without_a_trace_are_used(model: Any) -> None:
    """Fused optimizers and writes through ``.data`` change neither address nor version."""
    check(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    check(model)
    model.model.language_model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)
    check(model)


def test_a_resized_vocabulary_and_a_cast_are_seen(model: Any) -> None:
    check(model)
    model.resize_token_embeddings(750)
    check(model)
    assert get(model).config.vocab_size == 750
    model.to(torch.bfloat16)
    assert get(model).dtype == torch.bfloat16


def test_a_copy_has_an_engine_of_its_own(model: Any) -> None:
    check(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.language_model.layers[1].self_attn.q_proj.weight.mul_(0.5)
    check(other)
    check(model)
    assert get(other) is not get(model)


def test_nothing_keeps_the_model_alive(model: Any, shared: Any) -> None:
    copied = copy.deepcopy(model)
    check(copied)
    gone = weakref.ref(copied.model.language_model.layers[0].mlp.up_proj.weight)
    assert any(kept is copied for kept in engine_room._kept)
    count = len(engine_room._kept)
    del copied
    gc.collect()
    assert gone() is None
    assert len(engine_room._kept) < count


def test_bfloat16_keeps_the_models_rounded_frequencies() -> None:
    exact = load()
    rounded = load(torch.bfloat16).to(dtype=torch.bfloat16)  # as the official script does
    engine = get(rounded)
    frequencies = engine.view.text.inv_freq()
    assert torch.equal(frequencies, frequencies.bfloat16().float())
    batch = mixed()
    found = engine.hidden_at([engine.rows(inputs)[0] for inputs in batch], [-1] * 5).float()
    truth = torch.stack([official(exact, inputs)[-1] for inputs in batch])
    theirs = torch.stack([official(rounded, inputs)[-1] for inputs in batch]).float()
    assert (found - truth).norm() <= 2 * (theirs - truth).norm()
    assert (found - theirs).norm() <= 0.05 * theirs.norm()


class Old(nn.Module):
    """The layout of transformers up to 4.51 and of VLM2Vec's copies: model.layers and visual."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.model
        self.config, self.model, self.visual = model.config, inner.language_model, inner.visual
        self.lm_head = model.lm_head

    def forward(self) -> None:
        raise AssertionError("not called")


Old.forward.__module__ = "src.model.vlm_backbone.qwen2_vl.modeling_qwen2_vl"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies above count as modelling code that was checked."""
    monkeypatch.setattr(versions, "modelling_known", lambda name: True)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", ["old", "inner", "ddp", "compiled"])
def test_layouts_and_wrappers(model: Any, wrap: str) -> None:
    wrapped: nn.Module = {
        "old": Old,
        "inner": lambda m: m.model,
        "ddp": nn.parallel.DistributedDataParallel,
        "compiled": torch.compile,
    }[wrap](model)
    inputs = mixed()[1]
    engine = get(wrapped)
    expected = official(model, inputs)[-1]
    found = engine.hidden_at(engine.rows(inputs), [-1])[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_qwen2_5_vl() -> None:
    raw = json.loads((tiny_checkpoint() / "config.json").read_text())
    raw["model_type"] = "qwen2_5_vl"
    raw["vision_config"] = {
        "depth": 2, "hidden_size": 80, "num_heads": 5, "intermediate_size": 96,
        "out_hidden_size": 128, "window_size": 56, "fullatt_block_indexes": [1],
        "tokens_per_second": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig.from_dict(raw)
    check(transformers.Qwen2_5_VLForConditionalGeneration(config).eval())


def test_lists_of_tensors_per_row(model: Any) -> None:
    config = get(model).config
    picture, white = sample(3, (1, 6, 4), 1), sample(5, None, 0)
    words = torch.tensor([[*HEADER, 60, 61]])
    ids = torch.full((3, 22), 0)
    mask = torch.zeros_like(ids)
    for row, one in enumerate((picture["input_ids"], words, white["input_ids"])):
        ids[row, : one.shape[1]], mask[row, : one.shape[1]] = one, 1
    rows = rows_of_inputs(
        config,
        {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": [picture["pixel_values"], None, white["pixel_values"]],
            "image_grid_thw": [picture["image_grid_thw"], None, white["image_grid_thw"]],
            "pixel_values_videos": [None] * 3,
            "video_grid_thw": [None] * 3,
            "texts": ["not", "looked", "at"],
        },
    )
    assert [len(visuals) for _, visuals in rows] == [1, 0, 1]
    np.testing.assert_array_equal(rows[1][0], words[0].numpy())
    assert torch.equal(rows[0][1][0].patches, picture["pixel_values"])
    assert torch.equal(rows[2][1][0].patches, white["pixel_values"])


# -- no engine, and why ----------------------------------------------------------------------------


class Wrapped(nn.Linear):
    """Stands for a quantised layer."""


class Sharded(nn.Parameter):
    """Stands for a DTensor."""


@pytest.fixture
def layer(model: Any) -> Iterator[Any]:
    assert engine_for(model)[0] is not None
    return model.model.language_model.layers[1]


def test_reason_hook(model: Any, layer: Any) -> None:
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert "a hook on a Qwen2MLP" in reason_of(model)
    handle.remove()
    assert engine_for(model)[0] is not None


def test_reason_other_patch(model: Any, layer: Any) -> None:
    layer.input_layernorm.forward = lambda x: x
    assert "replaced by another library" in reason_of(model)


def test_reason_layer_type(model: Any, layer: Any) -> None:
    old = layer.mlp.up_proj
    layer.mlp.up_proj = Wrapped(old.in_features, old.out_features, bias=False)
    assert "decoder.layers.1.mlp.up_proj is a" in reason_of(model)
    assert "Wrapped" in reason_of(model)


def test_reason_lora(model: Any, layer: Any) -> None:
    class BaseTunerLayer:
        """PEFT's name."""

    class Linear(nn.Module, BaseTunerLayer):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.merged = base, False

    wrapper = layer.self_attn.q_proj = Linear(layer.self_attn.q_proj)
    assert "LoRA that is not merged" in reason_of(model)
    wrapper.merged = True
    engine_room._kept.clear()
    assert engine_for(model)[0] is not None


def test_reason_lora_unmerged_since(model: Any, layer: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.merge_adapter()
    assert engine_for(wrapped)[0] is not None
    with wrapped.disable_adapter():
        assert engine_for(wrapped)[0] is None
    assert engine_for(wrapped)[0] is not None
    wrapped.unmerge_adapter()
    assert "LoRA that is not merged" in reason_of(wrapped)


def test_reason_forward_of_a_class(model: Any, layer: Any) -> None:
    class Scaled(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert engine_for(model)[0] is not None
    layer.mlp.__class__ = Scaled
    assert "layers.1.mlp: a Scaled with a forward of" in reason_of(model)


def test_reason_activation(model: Any, layer: Any) -> None:
    assert engine_for(model)[0] is not None
    layer.mlp.act_fn = nn.GELU()
    assert reason_of(model) == "decoder.layers.1.mlp.act_fn is a GELU, not silu"


def test_reason_attention(model: Any, layer: Any) -> None:
    assert engine_for(model)[0] is not None
    layer.self_attn.is_causal = False
    assert "is not causal" in reason_of(model)


def test_reason_vision_activation(model: Any) -> None:
    model.model.visual.blocks[0].mlp.act = nn.ReLU()
    model.model.visual.blocks[0].mlp.act_fn = nn.ReLU()
    assert "vision tower.blocks.0.mlp is a ReLU" in reason_of(model)


def test_reason_norm_changed_since(model: Any, layer: Any) -> None:
    assert engine_for(model)[0] is not None
    layer.input_layernorm.variance_epsilon = 1e-2
    assert "not a plain layer" in reason_of(model)


def test_reason_global_hook(model: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "for all modules" in reason_of(model)
    finally:
        handle.remove()


def test_reason_storage(model: Any, layer: Any) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to("meta"))
    assert "no storage" in reason_of(model)


def test_reason_sharded(model: Any, layer: Any) -> None:
    layer.mlp.up_proj.weight = Sharded(layer.mlp.up_proj.weight.data)
    assert "sharded or quantised" in reason_of(model)


def test_reason_mixed_types(model: Any, layer: Any) -> None:
    layer.mlp.to(torch.bfloat16)
    assert "not of one type on one device: bfloat16 on cpu, float32 on cpu" in reason_of(model)


def test_reason_dropout(model: Any, layer: Any) -> None:
    layer.self_attn.attention_dropout = 0.1
    assert engine_for(model)[0] is not None
    model.train()
    assert "dropout is active" in reason_of(model)


def test_reason_other_model(model: Any) -> None:
    assert "not a Qwen2-VL" in reason_of(nn.Linear(2, 2))

    class Own(Old):
        def forward(self) -> None:
            raise AssertionError("not called")

    assert "a forward of its own" in reason_of(Own(model))


def test_a_prompt_beyond_the_positions_is_refused(model: Any) -> None:
    engine = get(model)
    with pytest.raises(ValueError, match="exceed 8192 positions"):
        engine.prompt((np.full(8190, 60), []), extra=5)
