"""UME-R1's discriminative prompts, as its published example and PLUME's copy write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from ume_models.embedders import plume_prompt
from ume_models.embedders.ume_r1 import UmeR1ForEmbedding

# the example of its page, with the blanks at the end of two lines
PUBLISHED = (
    "Represent the above input text, images, videos, or any combination of the three as "
    "embeddings. \nFirst output the thinking process in <think> </think> tags and then summarize "
    "the entire input in a word or sentence. \nFinally, use the <gen_emb> tag to represent the "
    "entire input."
)


@pytest.mark.parametrize(
    ("name", "request_"),
    [("official", PUBLISHED), ("plume-bundle", plume_prompt.GENERATION_PROMPT)],
)
def test_prompts(family_processor: Any, name: str, request_: str) -> None:
    processor = family_processor(UmeR1ForEmbedding.profiles[name])
    item = {"instruction": "Find:", "text": "a dog", "image": Image.new("RGB", (56, 56))}
    [plan] = processor.plan([item])
    assert processor.tokenizer.decode(plan.token_ids.tolist()) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Find: a dog\n<disc_emb>\n"
        f"{request_}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.plan([{"text": "a dog"}])[0].header == "text"
    assert processor.rules == plume_prompt.PROFILES["official"].rules


@pytest.mark.compat
@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    ("profile", "variant"),
    [("official", "ume_r1_disc"), ("plume-bundle", "ume_r1_disc_plume_bundle")],
)
def test_embeddings(
    load_family: Any, family_recorded: Any, agrees: Any, profile: str, variant: str, engine: str
) -> None:
    model = load_family(family="ume_r1", profile=profile, engine=engine)
    agrees(model, variant)
    got = model.embed(family_recorded.tensors["disc_repeat.input_ids"][None])[0]
    expected = family_recorded.expected("disc_repeat", variant)
    assert float((got - expected).abs().max()) <= 1e-5, "the last of two markers counts"


def test_a_prompt_without_the_marker_is_refused(load_family: Any) -> None:
    with pytest.raises(ValueError, match="<disc_emb>"):
        load_family(family="ume_r1").embed(torch.arange(20, 40)[None])
