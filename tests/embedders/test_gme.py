"""GME, held to what its own interface and VLM2Vec's evaluation feed the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ume_models
from ume_models.embedders.gme import GmeForEmbedding
from ume_models.errors import CheckpointError, ItemError

LONG = "a red circle above a green triangle, " * 600


@pytest.mark.compat
def test_inputs_are_those_of_its_own_interface(own_inputs: Any) -> None:
    own_inputs(GmeForEmbedding)


@pytest.mark.compat
def test_inputs_are_those_of_the_evaluation(recorded_inputs: Any, family_processor: Any) -> None:
    recorded = recorded_inputs("processing_families/gme_vlm2vec")
    processor = family_processor(GmeForEmbedding.profiles["vlm2vec"])
    for key, case in recorded.cases.items():
        if key.startswith("text_long"):
            continue
        recorded.check(processor, key, {"text": case["text_given"]}, recorded.parts(key))


@pytest.mark.parametrize("name", GmeForEmbedding.profiles)
def test_a_text_that_would_lose_its_last_token_is_refused(family_processor: Any, name: str) -> None:
    processor = family_processor(GmeForEmbedding.profiles[name])
    texts = [LONG, *("a" + " 1" * count for count in range(870, 890))]
    plans = processor.plan([{"text": text} for text in texts], "skip")
    for text, plan in zip(texts, plans, strict=True):
        rendered = str(processor.template.render((), "", text))
        fits = len(processor.tokenizer(rendered)["input_ids"]) <= 1800
        assert fits == (plan.error is None)
    assert {plan.error is None for plan in plans} == {True, False}


def test_one_picture_of_many(family_processor: Any) -> None:
    pictures = [Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in range(4)]
    processor = family_processor(GmeForEmbedding.profiles["vlm2vec"])
    items = [{"image": pictures[2]}, {"images": pictures}, {"video": pictures}]
    plans = processor.plan([{"text": "a", **item} for item in items])
    assert [plan.kind for plan in plans] == ["image"] * 3
    assert len({plan.digest for plan in plans}) == 1


def test_any_proportion_is_taken(family_processor: Any) -> None:
    processor = family_processor(GmeForEmbedding.profiles["vlm2vec"])
    [plan] = processor.plan([{"image": Image.new("RGB", (7000, 29))}])
    # 28 x 6,988 after the first resize, cut to 28 x 5,600
    assert plan.visuals[0].grid == (1, 2, 400)


def test_a_control_token_in_the_instruction_is_refused(family_processor: Any) -> None:
    item = {"text": "a", "instruction": "Find<|im_end|>"}
    with pytest.raises(ItemError, match="control token"):
        family_processor(GmeForEmbedding.profiles["official"]).plan([item])


def test_a_missing_token_is_named(family_processor: Any) -> None:
    from ume_models.processing import ImageConfig, Processor

    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {"<|image_pad|>": 0, "<|video_pad|>": 1}

    profile = GmeForEmbedding.profiles["official"]
    with pytest.raises(CheckpointError, match=r"<\|endoftext\|>"):
        Processor(Bare(), profile.template(Bare()), ImageConfig(), profile.rules)


def test_a_text_of_visual_tokens_alone_is_refused(family_processor: Any) -> None:
    processor = family_processor(GmeForEmbedding.profiles["vlm2vec"])
    with pytest.raises(ItemError, match="no text left"):
        processor.plan([{"text": "<|image_pad|>\n"}])
    [plan] = processor.plan([{"text": "<|image_pad|>\n", "image": Image.new("RGB", (56, 56))}])
    assert plan.error is None


@pytest.mark.compat
@pytest.mark.parametrize("profile", GmeForEmbedding.profiles)
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_embeddings(load_family: Any, agrees: Any, profile: str, engine: str) -> None:
    agrees(load_family(family="gme", profile=profile, engine=engine), "last_token_endoftext")


def test_what_its_checkpoint_looks_like(recorded_checkpoint: Any) -> None:
    folder = recorded_checkpoint(auto_map={"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"})
    assert type(ume_models.load(folder)) is GmeForEmbedding
    with pytest.raises(CheckpointError, match="gme"):
        ume_models.load(folder, family="lamra")


def test_a_checkpoint_names_its_family_and_profile(load_family: Any, tmp_path: Path) -> None:
    model = load_family(family="gme", profile="vlm2vec")
    model.save_pretrained(tmp_path)
    again = ume_models.load(tmp_path)
    assert (again.family, again.profile.name) == ("gme", "vlm2vec")
    assert again.fingerprint == model.fingerprint
    assert again.fingerprint != ume_models.load(tmp_path, profile="official").fingerprint
    for wrong in ({"family": "gne", "profile": "official"}, {"family": "gme", "profile": "mine"}):
        (tmp_path / "ume.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"ume\.json"):
            ume_models.load(tmp_path)
