"""VLM2Vec-V2, held to what its official code feeds the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ume_models.embedders.vlm2vec import Vlm2VecForEmbedding
from ume_models.errors import ItemError


@pytest.mark.parametrize(
    ("name", "recording"),
    [("official", "vlm2vec_v2_main"), ("plume-bundle", "vlm2vec_v2_bundle")],
)
def test_inputs_are_the_recorded_ones(
    recorded_inputs: Any, family_processor: Any, name: str, recording: str
) -> None:
    recorded = recorded_inputs(f"processing_families/{recording}")
    processor = family_processor(Vlm2VecForEmbedding.profiles[name])
    assert len(recorded.cases) == 30
    for key, case in recorded.cases.items():
        recorded.check(processor, key, {"text": case["text_given"]}, recorded.parts(key))


def prompt(processor: Any, item: dict[str, Any]) -> str:
    [plan] = processor.plan([item])
    text: str = processor.tokenizer.decode(plan.token_ids.tolist())
    return text


def test_words_with_their_own_visual_tokens_are_taken_as_they_are(family_processor: Any) -> None:
    processor = family_processor(Vlm2VecForEmbedding.profiles["official"])
    picture = Image.new("RGB", (56, 56))
    given = " first <|image_pad|> then <|image_pad|> "
    assert prompt(processor, {"text": given, "images": [picture, picture]}) == given
    inside = {"instruction": "<|image_pad|>\nFind:", "text": "a dog", "image": picture}
    assert prompt(processor, inside) == "<|image_pad|>\nFind: a dog"
    assert prompt(processor, {"image": picture}) == "<|image_pad|>\n\n"
    assert prompt(processor, {"video": [picture], "text": "go"}) == "<|video_pad|> go"


@pytest.mark.parametrize(
    ("text", "images", "frames"),
    [
        ("<|image_pad|> a", 2, 0),
        ("<|image_pad|><|image_pad|> a", 1, 0),
        ("<|image_pad|> a", 0, 0),
        ("<|image_pad|> a", 0, 2),
        ("<|video_pad|> a", 1, 0),
        ("<|video_pad|><|image_pad|> a", 1, 0),
        ("<|im_end|>", 1, 0),
        ("<|image_pad|><|vision_start|>", 1, 0),
    ],
)
def test_tokens_that_do_not_fit_the_media_are_refused(
    family_processor: Any, text: str, images: int, frames: int
) -> None:
    picture = Image.new("RGB", (56, 56))
    item = {"text": text, "images": [picture] * images or None, "video": [picture] * frames or None}
    with pytest.raises(ItemError, match=r"<\|"):
        family_processor(Vlm2VecForEmbedding.profiles["official"]).plan([item])


def test_odd_shapes_become_squares(family_processor: Any) -> None:
    processor = family_processor(Vlm2VecForEmbedding.profiles["official"])

    def grid(width: int, height: int, field: str = "image") -> list[int]:
        picture = Image.new("RGB", (width, height))
        [plan] = processor.plan([{field: picture if field == "image" else [picture]}])
        return [*plan.visuals[0].grid]

    assert grid(27, 500) == [1, 4, 4]  # a side of less than a token: 56 x 56
    assert grid(28, 500) == [1, 36, 2]
    assert grid(30, 6001) == [1, 70, 70]  # more than 200 to 1: a square of 1,280 tokens
    assert grid(27, 500, "video") == [1, 36, 36]  # frames: a square of the longer side


def test_frames_follow_the_first_one(family_processor: Any) -> None:
    rng = np.random.default_rng(0)
    first, second = (
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((84, 112), (140, 56))
    )
    processor = family_processor(Vlm2VecForEmbedding.profiles["official"])
    resized = second.resize(first.size, Image.Resampling.BICUBIC)
    got, want = (
        processor.load(plan).pixel_values_videos
        for plan in processor.plan([{"video": [first, other]} for other in (second, resized)])
    )
    assert torch.equal(got, want)


@pytest.mark.compat
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_embeddings(load_family: Any, agrees: Any, engine: str) -> None:
    agrees(load_family(family="vlm2vec", engine=engine), "last_token")


def test_items_and_rendered_prompts_give_the_same(load_family: Any) -> None:
    model = Vlm2VecForEmbedding.from_pretrained(load_family(family="vlm2vec").sources[0])
    items = [{"text": "a red circle", "instruction": "Find:"}, {"text": "the digit seven"}]
    rows = [model.embed(item.input_ids[None])[0] for item in model.prepare(items)]
    torch.testing.assert_close(model.encode(items), torch.stack(rows), rtol=0, atol=1e-6)
