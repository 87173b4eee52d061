"""The decode step against transformers' own decoder layer and against a plain attention loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ume_kernels import DecoderLayerWeights, LayerShape, decode_layer, decode_step, rope_table
from ume_kernels.decode.reference import decode_layer_reference, ragged_attention
from ume_kernels.dispatch import BackendError


def make_layer(width=48, heads=4, kv_heads=2, dim=16, inner=96, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype) * 0.2

    weights = DecoderLayerWeights(
        input_norm=1 + draw(width),
        q_weight=draw(heads * dim, width),
        q_bias=draw(heads * dim),
        k_weight=draw(kv_heads * dim, width),
        k_bias=draw(kv_heads * dim),
        v_weight=draw(kv_heads * dim, width),
        v_bias=draw(kv_heads * dim),
        o_weight=draw(width, heads * dim),
        post_norm=1 + draw(width),
        gate_weight=draw(inner, width),
        up_weight=draw(inner, width),
        down_weight=draw(width, inner),
    )
    return weights, LayerShape(heads, kv_heads, dim, 1e-6)


def table(dim: int, positions: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_table(positions, 10000.0 ** (-torch.arange(0, dim, 2).float() / dim))


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    queries=st.integers(1, 8),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_ragged_attention_equals_a_plain_loop(lengths, queries, kv_heads, group, seed):
    torch.manual_seed(seed)
    batch, dim = len(lengths), 8
    capacity = max(lengths) + queries + 3
    q = torch.randn(batch, queries, kv_heads * group, dim)
    keys, values = torch.randn(2, batch, kv_heads, capacity, dim).unbind(0)
    shape = LayerShape(kv_heads * group, kv_heads, dim, 1e-6)
    step = decode_step(torch.tensor(lengths), queries, capacity, table(dim), shape, torch.float32)
    got = ragged_attention(q, keys, values, step.visible)
    for b, length in enumerate(lengths):
        for i in range(queries):
            for h in range(kv_heads * group):
                seen = length + i + 1
                k, v = keys[b, h // group, :seen], values[b, h // group, :seen]
                p = torch.softmax(k @ q[b, i, h] / dim**0.5, dim=0)
                torch.testing.assert_close(got[b, i, h], p @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize("offset", [0, -2, 30])
def test_layer_equals_transformers(tmp_path, offset):
    """One row, prompt and then two chunks, against Qwen2's decoder layer over the whole text.

    Positions behind the prompt go on ``offset`` from where it ends.
    """
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=11,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        attn_implementation="eager",
    )
    theirs = Qwen2Model(config).eval()
    layer = theirs.layers[0]
    a, m = layer.self_attn, layer.mlp
    weights = DecoderLayerWeights(
        layer.input_layernorm.weight, a.q_proj.weight, a.q_proj.bias, a.k_proj.weight,
        a.k_proj.bias, a.v_proj.weight, a.v_proj.bias, a.o_proj.weight,
        layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight,
        m.down_proj.weight,
    )  # fmt: skip
    shape = LayerShape(4, 2, 12, 1e-6)
    theirs.norm = torch.nn.Identity()
    embeds = torch.randn(1, 9, 48)
    with torch.inference_mode():
        positions = torch.arange(9) + offset * (torch.arange(9) >= 4)
        expected = theirs(inputs_embeds=embeds, position_ids=positions[None]).last_hidden_state
        keys, values = torch.zeros(2, 1, 2, 16, 12).unbind(0)
        got = []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            moved = torch.tensor([offset]) if start and offset else None
            step = decode_step(
                torch.tensor([start]), stop - start, stop, table(12), shape, torch.float32, moved
            )
            chunk = embeds[:, start:stop]
            got.append(decode_layer(chunk, step, keys, values, weights, shape))
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other_or_the_unused_arena():
    torch.manual_seed(1)
    weights, shape = make_layer()
    lengths = torch.tensor([3, 7, 1])
    hidden = torch.randn(3, 2, 48)
    keys, values = torch.randn(2, 3, 2, 32, 16).unbind(0)
    noisy_keys, noisy_values = keys.clone(), values.clone()
    for row, length in enumerate(lengths):
        noisy_keys[row, :, int(length) + 2 :] = 1e4
        noisy_values[row, :, int(length) + 2 :] = -1e4
    step = decode_step(lengths, 2, 9, table(16), shape, torch.float32)
    together = decode_layer(hidden, step, noisy_keys, noisy_values, weights, shape)
    for row in range(3):
        one = slice(row, row + 1)
        step = decode_step(lengths[one], 2, int(lengths[row]) + 2, table(16), shape, torch.float32)
        alone = decode_layer(
            hidden[one], step, keys[one].clone(), values[one].clone(), weights, shape
        )
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_composed_equals_the_definition(dtype, close):
    torch.manual_seed(2)
    weights, shape = make_layer(dtype=dtype)
    step = decode_step(torch.tensor([3, 7, 1]), 2, 9, table(16), shape, dtype)
    hidden = torch.randn(3, 2, 48).to(dtype)
    arena = torch.randn(2, 3, 2, 32, 16).to(dtype)
    expected_arena = arena.clone()
    got = decode_layer(hidden, step, *arena, weights, shape, backend="composed")
    expected = decode_layer_reference(hidden, step, *expected_arena, weights, shape)
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    torch.testing.assert_close(arena, expected_arena, rtol=close, atol=close)
    with pytest.raises(BackendError, match="meta"):
        decode_layer(hidden.to("meta"), step, *arena, weights, shape, backend="composed")


def test_wrong_arguments_are_named():
    weights, shape = make_layer()
    hidden = torch.randn(1, 1, 48)
    keys, values = torch.zeros(2, 1, 2, 8, 16).unbind(0)

    def step(lengths, max_length):
        return decode_step(torch.tensor(lengths), 1, max_length, table(16), shape, torch.float32)

    with pytest.raises(ValueError, match="9 tokens do not fit an arena of capacity 8"):
        decode_layer(hidden, step([8], 9), keys, values, weights, shape)
    with pytest.raises(ValueError, match="step is for"):
        decode_layer(hidden, step([1, 2], 8), keys, values, weights, shape)
    with pytest.raises(ValueError, match="values must be"):
        decode_layer(hidden, step([1], 8), keys, values[:, :1], weights, shape)
    with pytest.raises(ValueError, match="1 … 64 new tokens per row, got 65"):
        decode_layer(torch.randn(1, 65, 48), step([1], 8), keys, values, weights, shape)
