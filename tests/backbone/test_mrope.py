"""M-RoPE positions against the official transformers 4.52 and against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ume_models.backbone.config import read_config
from ume_models.backbone.mrope import mrope_cos_sin, mrope_position_ids


@pytest.fixture(scope="module")
def config(checkpoint_dir):
    return read_config(checkpoint_dir)


def plain_loop(pieces, merge):
    """Token by token: ``pieces`` are ("text", n) or (kind, (t, h, w))."""
    out, start = [], 0
    for kind, value in pieces:
        if kind == "text":
            for _ in range(value):
                out.append((start, start, start))
                start += 1
        else:
            t, h, w = value[0], value[1] // merge, value[2] // merge
            block = [
                (start + a, start + b, start + c)
                for a in range(t)
                for b in range(h)
                for c in range(w)
            ]
            out += block
            start = max(max(p) for p in block) + 1
    return np.array(out).T


text = st.tuples(st.just("text"), st.integers(1, 9))
grid = st.tuples(
    st.integers(1, 6),
    st.integers(1, 4).map(lambda x: 2 * x),
    st.integers(1, 4).map(lambda x: 2 * x),
)
visual = st.tuples(st.sampled_from(["image", "video"]), grid)


@given(blocks=st.lists(st.tuples(text, visual), max_size=4), tail=text)
def test_any_mixture_equals_a_plain_loop(config, blocks, tail):
    pieces = [piece for pair in blocks for piece in pair] + [tail]
    pad = {"image": config.image_token_id, "video": config.video_token_id}
    ids, grids = [], {"image": [], "video": []}
    for kind, value in pieces:
        if kind == "text":
            ids += [5] * value
        else:
            ids += [pad[kind]] * (value[0] * value[1] * value[2] // 4)
            grids[kind].append(value)
    got = mrope_position_ids(ids, config, grids["image"], grids["video"])
    np.testing.assert_array_equal(got, plain_loop(pieces, 2))


@pytest.mark.compat
@pytest.mark.skipif(
    not transformers.__version__.startswith("4."), reason="transformers 5 computes another index"
)
def test_recorded_prompts_equal_transformers_4(recorded, load_recorded):
    model = load_recorded(engine="reference")
    for name in recorded.names:
        inputs = recorded.inputs(name)
        expected, _ = model.reference.model.model.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            torch.ones_like(inputs["input_ids"]),
        )
        grids = [
            [tuple(g) for g in inputs.get(key, torch.empty(0, 3)).tolist()]
            for key in ("image_grid_thw", "video_grid_thw")
        ]
        got = mrope_position_ids(inputs["input_ids"][0], model.config, *grids)
        np.testing.assert_array_equal(got, expected[:, 0].numpy(), err_msg=name)


def test_text_after_a_long_video_continues_behind_the_last_frame(config):
    ids = [5] + [config.video_token_id] * 6 + [5]
    got = mrope_position_ids(ids, config, (), [(6, 2, 2)])
    assert got[:, -1].tolist() == [7, 7, 7]


def test_tokens_and_grids_must_match(config):
    image = config.image_token_id
    with pytest.raises(ValueError, match="more than the 0 images"):
        mrope_position_ids([image], config)
    with pytest.raises(ValueError, match="needs 4 visual tokens"):
        mrope_position_ids([image] * 3, config, [(1, 4, 4)])
    with pytest.raises(ValueError, match="1 images and 0 videos given"):
        mrope_position_ids([5], config, [(1, 2, 2)])


def test_equal_axes_give_plain_rope(config):
    positions = torch.arange(7)
    inv_freq = torch.rand(config.head_dim // 2)
    cos, sin = mrope_cos_sin(positions.expand(3, -1), inv_freq, config.mrope_section, torch.float32)
    angles = positions[:, None].float() * inv_freq
    torch.testing.assert_close(cos, torch.cat([angles, angles], -1).cos())
    torch.testing.assert_close(sin, torch.cat([angles, angles], -1).sin())
