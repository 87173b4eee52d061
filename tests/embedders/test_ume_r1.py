"""UME-R1: prompts as its published example and PLUME's copy write them, embeddings as recorded."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from PIL import Image

from ume_models.backbone.transformers_model import build_transformers_model
from ume_models.embedders import plume_prompt
from ume_models.embedders.ume_r1 import UmeR1ForEmbedding
from ume_models.errors import CapacityError, OptionError

TRANSFORMERS = int(metadata.version("transformers").split(".")[0])

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


@pytest.mark.compat
@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("tap", ["official", "at_token"])
@pytest.mark.parametrize("budget", [24, 8])
def test_generated_embeddings(
    load_family: Any, family_recorded: Any, writes: Any, engine: str, tap: str, budget: int
) -> None:
    model = load_family(family="ume_r1", engine=engine)
    variant = f"ume_r1_gen_n{budget}"
    for names, trace in writes(
        model, variant, f"{variant}.{tap}", mode="gen", tap=tap, max_new_tokens=budget
    ):
        assert trace.fallback == [493 not in ids for ids in trace.token_ids]
        assert trace.route == ["reason"] * len(names)


@pytest.mark.compat
def test_words_are_those_of_transformers(load_family: Any, family_recorded: Any) -> None:
    """Its own ``generate``, with the images; the clip on which versions disagree is recorded."""
    model = load_family(family="ume_r1")
    theirs = build_transformers_model(model.config, model.state_dict(), 512)
    for name in family_recorded.names:
        inputs = family_recorded.inputs(name)
        trace = model.embed(**inputs, mode="gen", max_new_tokens=16, return_trace=True)[1]
        if name == "video_8":
            expected = family_recorded.tensors["video_8.ume_r1_gen_n24.ids"][:16].tolist()
        else:
            pads = torch.tensor([model.config.image_token_id, model.config.video_token_id])
            kinds = (inputs["input_ids"][..., None] == pads).int() @ torch.tensor([1, 2]).int()
            found = theirs.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                **({"mm_token_type_ids": kinds} if TRANSFORMERS >= 5 else {}),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=482,
                pad_token_id=480,
            )
            expected = found[0, inputs["input_ids"].shape[1] :].tolist()
        assert trace.token_ids == [expected], name


def test_a_thought_without_end_is_closed(load_family: Any, family_recorded: Any) -> None:
    """The same as a prompt that holds thought and closing; one token is no thought."""
    model = load_family(family="ume_r1")
    inputs = family_recorded.inputs("video_4")
    got, trace = model.embed(**inputs, mode="gen", max_new_tokens=6, close=True, return_trace=True)
    assert trace.fallback == [True]
    closing = model.token_ids("</think><answer><gen_emb>")
    written = torch.tensor([[*trace.token_ids[0], *closing]])
    reads_the_last = load_family(family="vlm2vec")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], written], dim=1)
    assert float((got - reads_the_last.embed(**inputs)).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"mode": "think"}, "mode"),
        ({"tap": "before"}, "tap"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_options(load_family: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        load_family(family="ume_r1").embed(torch.arange(20, 40)[None], **options)


def test_a_budget_beyond_the_positions_is_refused(load_family: Any, family_recorded: Any) -> None:
    with pytest.raises(CapacityError, match="positions"):
        load_family(family="ume_r1").embed(
            **family_recorded.inputs("text_only"), mode="gen", max_new_tokens=4096
        )


def test_options_stand_in_manifests(load_family: Any) -> None:
    model = load_family(family="ume_r1")
    disc = model.described(model.options)
    gen = model.described(model.options.replaced({"mode": "gen", "tap": "at_token"}))
    assert "mode" not in disc, "stores of single passes stay as they are"
    assert (gen["mode"], gen["tap"], gen["max_new_tokens"]) == ("gen", "at_token", 8192)
