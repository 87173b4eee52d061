"""A mask of the new tokens only means, on a cache, that nothing is padding."""

from __future__ import annotations

import pytest
import torch
import transformers

from ume_models.patching import apply, revert
from ume_models.patching.forwards import cached_tokens, repair_suffix_mask

pytestmark = pytest.mark.compat

PREFIX, SUFFIX = 11, 5
ids = torch.arange(3, 3 + PREFIX + SUFFIX)[None]
positions = torch.arange(PREFIX, PREFIX + SUFFIX).expand(3, 1, -1)
SHORT = torch.ones(1, SUFFIX, dtype=torch.long)
FULL = torch.ones(1, PREFIX + SUFFIX, dtype=torch.long)


def holders(model, text):
    """The three calls that lead to the decoder, with what holds their hidden states."""
    embeds = text.embed_tokens(ids[:, PREFIX:])
    return {
        "decoder": (text, {"inputs_embeds": embeds}),
        "model": (model.model, {"input_ids": ids[:, PREFIX:]}),
        "whole": (model, {"input_ids": ids[:, PREFIX:], "output_hidden_states": True}),
    }


@torch.no_grad()
def run(model, text, holder, mask, **options):
    """Hidden states of the suffix on the prefix's cache, as the official evaluation calls it."""
    cache = text(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
    module, given = holders(model, text)[holder]
    out = module(
        **given,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **options,
    )
    return out.hidden_states[-1] if holder == "whole" else out.last_hidden_state


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("holder", ["decoder", "model", "whole"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_short_mask_is_right_when_patched_and_wrong_when_not(
    build, text_of, family, holder, attention
):
    model = build(family, attention)
    text = text_of(model)
    no_mask = run(model, text, holder, None)
    torch.testing.assert_close(run(model, text, holder, FULL), no_mask, rtol=1e-5, atol=1e-5)

    def original_is_wrong():
        try:
            found = run(model, text, holder, SHORT)
        except (RuntimeError, ValueError):
            return True  # transformers 4.52
        return float((found - no_mask).abs().max()) > 1e-2

    assert original_is_wrong()
    report = apply(model)
    assert any(entry.target.endswith("model") for entry in report.repaired)
    torch.testing.assert_close(run(model, text, holder, SHORT), no_mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(model, text, holder, FULL), no_mask, rtol=1e-5, atol=1e-5)
    revert(report)
    assert original_is_wrong()


@torch.no_grad()
def test_without_positions_the_repaired_mask_counts_from_the_cache(build, text_of):
    model = build()
    text = text_of(model)
    apply(model)

    def call(mask):
        cache = text(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
        at = torch.arange(PREFIX, PREFIX + SUFFIX)
        extra = {} if transformers.__version__.startswith("5") else {"cache_position": at}
        given = {"input_ids": ids[:, PREFIX:], "past_key_values": cache, **extra}
        return model.model(**given, attention_mask=mask).last_hidden_state

    model(input_ids=ids[:, :PREFIX])  # positions of the prefix are known, as in generate()
    torch.testing.assert_close(call(SHORT), call(None))


@torch.no_grad()
def test_mask_may_come_by_position(build, text_of):
    model = build()
    text = text_of(model)
    apply(model)

    def call(mask):
        cache = text(ids[:, :PREFIX], use_cache=True).past_key_values
        return text(ids[:, PREFIX:], mask, positions, cache).last_hidden_state

    torch.testing.assert_close(call(SHORT), call(None))


@torch.no_grad()
def test_masks_that_say_something_reach_the_original(build, text_of, monkeypatch):
    model = build()
    text = text_of(model)
    apply(model)
    seen = []
    kept = type(text).forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs.get("attention_mask"))
        return kept(self, *args, **kwargs)

    kind = type(text(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values)
    monkeypatch.setattr(type(text), "forward", spy)
    padded = FULL.clone()
    padded[0, 0] = 0
    wide = torch.zeros(1, 1, SUFFIX, PREFIX + SUFFIX)
    for mask in (padded, FULL, wide):
        cache = text(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
        given = {"position_ids": positions, "past_key_values": cache}
        text(input_ids=ids[:, PREFIX:], attention_mask=mask, **given)
        assert seen[-1] is mask
    text(input_ids=ids, attention_mask=FULL, use_cache=False)
    assert seen[-1] is FULL
    prefix = torch.ones(1, PREFIX, dtype=torch.long)
    text(input_ids=ids[:, :PREFIX], attention_mask=prefix, past_key_values=kind())
    assert seen[-1] is prefix


@torch.no_grad()
def test_compiled_decoder_is_repaired_too(build, text_of):
    model = build()
    text = text_of(model)
    expected = run(model, text, "decoder", None)
    apply(model)
    compiled = torch.compile(text, backend="eager")
    cache = text(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
    embeds = text.embed_tokens(ids[:, PREFIX:])
    found = compiled(
        inputs_embeds=embeds,
        attention_mask=SHORT,
        position_ids=positions,
        past_key_values=cache,
    ).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_which_masks_are_repaired():
    ones = torch.ones(2, 4, dtype=torch.long)
    holes = ones.clone()
    holes[1, 0] = 0
    assert repair_suffix_mask(ones, 4, cached=7) is None
    assert repair_suffix_mask(ones.bool(), 4, cached=7) is None
    assert repair_suffix_mask(ones.float(), 4, cached=7) is None
    for mask, new, cached in ((ones, 4, 0), (ones, 3, 1), (holes, 4, 7), (ones[None, None], 4, 7)):
        assert repair_suffix_mask(mask, new, cached) is mask
    assert repair_suffix_mask(None, 4, cached=7) is None


def test_length_of_every_kind_of_cache():
    key = torch.zeros(1, 2, 6, 8)
    assert cached_tokens(((key, key), (key, key))) == 6
    assert cached_tokens(()) == 0
    cache = transformers.DynamicCache()
    assert cached_tokens(cache) == 0
    cache.update(key, key, 0)
    assert cached_tokens(cache) == 6
