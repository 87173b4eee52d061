"""LamRA, held to what its own code and VLM2Vec's evaluation feed the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from ume_models.embedders.lamra import LamraForEmbedding

LONG = "a red circle above a green triangle, " * 600


@pytest.mark.compat
def test_inputs_are_those_of_its_own_code(own_inputs: Any) -> None:
    own_inputs(LamraForEmbedding)


@pytest.mark.compat
def test_inputs_are_those_of_the_evaluation(recorded_inputs: Any, family_processor: Any) -> None:
    recorded = recorded_inputs("processing_families/lamra_vlm2vec")
    processor = family_processor(LamraForEmbedding.profiles["vlm2vec"])
    for key, case in recorded.cases.items():
        recorded.check(processor, key, {"text": case["text_given"]}, recorded.parts(key))


def words(processor: Any, item: dict[str, Any]) -> str:
    [plan] = processor.plan([item])
    text: str = processor.tokenizer.decode(plan.token_ids.tolist())
    return text.split("user\n")[1].split("<|im_end|>")[0].split("<|vision_end|>")[-1]


def test_words_become_sentences_but_beside_a_clip(family_processor: Any) -> None:
    processor = family_processor(LamraForEmbedding.profiles["official"])
    picture = Image.new("RGB", (56, 56))
    ask = "\nSummarize above {} in one word: "
    assert words(processor, {"text": ' "a dog" '}) == "A dog." + ask.format("sentence")
    assert words(processor, {"text": "who?\r\n"}) == "Who?" + ask.format("sentence")
    both = {"instruction": "find it:", "text": "a dog!"}
    assert words(processor, both) == "Find it:. a dog!" + ask.format("sentence")
    assert words(processor, {**both, "image": picture}).endswith(ask.format("image and sentence"))
    clip = words(processor, {**both, "video": [picture]})
    assert clip == "find it: a dog!" + ask.format("video and sentence")
    assert words(processor, {"video": [picture]}) == ask.format("video")


def test_a_candidate_that_would_lose_its_marker_is_refused(family_processor: Any) -> None:
    processor = family_processor(LamraForEmbedding.profiles["official"])
    query, candidate = processor.plan(
        [{"text": LONG, "instruction": "Find it."}, {"text": LONG}], "skip"
    )
    assert query.error is None and query.num_tokens > 1024
    assert "1024" in str(candidate.error)
    [clip] = processor.plan([{"text": LONG, "video": [Image.new("RGB", (56, 56))]}])
    assert clip.error is None


@pytest.mark.compat
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_embeddings(
    load_family: Any, family_recorded: Any, agrees: Any, engine: str
) -> None:
    model = load_family(family="lamra", engine=engine)
    agrees(model, "lamra_pre")
    got = model.embed(family_recorded.tensors["emb_repeat.input_ids"][None])[0]
    expected = family_recorded.expected("emb_repeat", "lamra_pre")
    assert float((got - expected).abs().max()) <= 1e-5, "the first of two markers counts"


def test_the_evaluation_of_others_reads_the_last_token(load_family: Any) -> None:
    model = load_family(family="lamra", profile="vlm2vec")
    [item] = model.prepare([{"text": "a red circle"}])
    hidden = load_family(family="vlm2vec").embed(item.input_ids[None])
    torch.testing.assert_close(model.embed_prepared([item]), hidden, rtol=0, atol=1e-6)
