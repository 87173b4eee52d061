"""Arguments of ``embed``, the end-of-sequence check, and inputs that do not fit together."""

from __future__ import annotations

import pytest
import torch

import ume_models
from ume_models.errors import CapacityError


@pytest.fixture(scope="module")
def model(load_recorded):
    return load_recorded(engine="fast")


def test_official_disc_offset_reads_the_next_token(checkpoint_dir, recorded):
    inputs = recorded.inputs("text_only")
    shifted = ume_models.load(checkpoint_dir, disc_offset=1)
    exact = ume_models.load(checkpoint_dir)
    at = int((inputs["input_ids"][0] == exact.tokens.disc_emb).nonzero()[-1])
    cut = {"input_ids": inputs["input_ids"][:, : at + 2]}
    torch.testing.assert_close(
        shifted.embed(**inputs, mode="disc"), exact.embed(**cut, mode="last")
    )
    assert not torch.allclose(
        shifted.embed(**inputs, mode="disc"), exact.embed(**inputs, mode="disc"), atol=1e-3
    )


def test_the_last_disc_token_is_the_anchor(model, recorded):
    inputs = recorded.inputs("text_only")
    ids = inputs["input_ids"].clone()
    ids[0, 20] = model.tokens.disc_emb  # the user's own text may contain it
    _, trace = model.embed(ids, return_trace=True)
    last = int((ids[0] == model.tokens.disc_emb).nonzero()[-1])
    single = model.embed(ids[:, : last + 1], mode="last")
    torch.testing.assert_close(
        torch.nn.functional.normalize(trace.anchor, dim=-1), single, rtol=0, atol=1e-5
    )


def test_prompts_without_disc_token(model):
    ids = torch.arange(20, 60)[None]
    with_anchor = model.embed(ids, context="disc")
    torch.testing.assert_close(with_anchor, model.embed(ids, context="prefix_last"))
    with pytest.raises(ValueError, match="<disc_emb>"):
        model.embed(ids, mode="disc")


@pytest.mark.parametrize("stops", [True, False])
def test_verify_eos_takes_the_official_result(checkpoint_dir, recorded, stops):
    """Random weights go on after the suffix; then the state at a generated <gen_emb> wins."""
    official = ume_models.load(checkpoint_dir, engine="reference", max_new_tokens=6)
    fast = ume_models.load(checkpoint_dir, max_new_tokens=6)
    batch = recorded.batch(["text_only", "image_wide", "video_4"], "left", pad_id=0)
    _, trace = fast.embed(**batch, return_trace=True)
    following = (trace.hidden @ fast.model.embed_tokens.weight.T).argmax(-1).tolist()
    for model in (fast, official):
        # make the model stop at once, or make its next token count as <gen_emb>
        gen = 0 if stops else following[1]
        assert (gen in following) != stops
        eos = frozenset(following if stops else ())
        model.tokens = type(model.tokens)(gen, model.tokens.disc_emb, eos)
    plain = fast.embed(**batch)
    expected = official.embed(**batch)
    got = fast.embed(**batch, verify_eos=True)
    assert float((got - expected).abs().max()) <= 1e-5
    assert torch.equal(got, plain) == stops


def test_a_fused_optimizer_step_is_seen(checkpoint_dir):
    """It changes weights without a new address or version; headers were computed with the old."""
    items = [{"text": "a red circle"}, {"text": "a blue square on the left"}]
    model = ume_models.load(checkpoint_dir, max_new_tokens=0)
    before = model.encode(items)
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True).step()
    fresh = ume_models.load(checkpoint_dir, max_new_tokens=0)
    fresh.load_state_dict(model.state_dict())
    after = model.encode(items)
    assert float((after - before).abs().max()) > 1e-3
    assert float((after - fresh.encode(items)).abs().max()) <= 1e-5


def test_arguments_that_do_not_fit(model, recorded):
    inputs = recorded.inputs("image_wide")
    ids = inputs["input_ids"]
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    for arguments, message in (
        ({"input_ids": ids[0]}, r"integers \[B, N\]"),
        ({"input_ids": ids.float()}, r"integers \[B, N\]"),
        ({"input_ids": ids}, "row 0 has image tokens but no image is left"),
        ({"input_ids": ids, "pixel_values": pixels}, "patches and image grids together"),
        (
            {"input_ids": ids, "pixel_values": pixels[:-1], "image_grid_thw": grid},
            "grids describe",
        ),
        (
            {"input_ids": ids[:, :30], "pixel_values": pixels, "image_grid_thw": grid},
            "was the prompt truncated",
        ),
        (
            {"input_ids": ids[:, :5], "pixel_values": pixels, "image_grid_thw": grid},
            "1 of 1 images have no tokens",
        ),
        (
            {"input_ids": ids, "pixel_values": pixels[:, :7], "image_grid_thw": grid},
            r"must be \[P, 1176\]",
        ),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.zeros(1, 2)},
            "row 0 has no",
        ),
        ({"input_ids": torch.tensor([[1, 9999]])}, "row 0 has token ids outside"),
        (
            {"input_ids": torch.tensor([[1]]), "attention_mask": torch.ones(1, 2)},
            "attention_mask is",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(**arguments)


def test_options_that_do_not_exist(model, recorded, load_recorded):
    ids = recorded.inputs("text_only")["input_ids"]
    for options, message in (
        ({"mode": "both"}, "mode"),
        ({"latent_steps": -1}, "latent_steps must be"),
        ({"latent_steps": 2.5}, "latent_steps must be"),
        ({"latent_steps": True}, "latent_steps must be"),
        ({"context": "x"}, "context must be"),
        ({"exclude_experts": (0, 1, 2)}, "leaves 1"),
        ({"exclude_experts": (4,)}, "cannot exclude"),
        ({"mode": "disc", "return_trace": True}, "return_trace needs"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(ids, **options)
    with pytest.raises(ValueError, match="needs the adapter"):
        load_recorded(engine="fast", adapter=False).embed(ids, exclude_experts=(0,))


def test_prompts_beyond_the_positions(model):
    limit = model.config.max_position_embeddings
    for length, options in (
        (limit + 1, {}),
        (limit + 1, {"mode": "last"}),
        (100, {"latent_steps": limit}),
    ):
        with pytest.raises(CapacityError, match="exceeds the model's 4096 positions"):
            model.embed(torch.full((1, length), 30), **options)


def test_what_processors_of_transformers_5_add_is_accepted(model, recorded):
    inputs = recorded.inputs("text_only")
    kinds = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(model.embed(**inputs, mm_token_type_ids=kinds), model.embed(**inputs))


def test_more_than_32_steps_share_the_last_step_embedding(model, load_recorded, recorded):
    inputs = recorded.inputs("text_only")
    expected = load_recorded(engine="reference").embed(**inputs, latent_steps=35)
    got = model.embed(**inputs, latent_steps=35)
    assert float((got - expected).abs().max()) <= 1e-5
