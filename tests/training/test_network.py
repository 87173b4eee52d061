"""The training network against transformers and against recorded outputs of the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.support.bundled.data import Encoder, Side
from tests.support.bundled.network import PlumeNetwork
from tests.support.bundled.step import embed_side, prefill_side
from ume_models.backbone.config import read_config
from ume_models.backbone.mrope import mrope_position_ids

RECORDED = Path(__file__).parents[1] / "conformance" / "plume_tiny"
CASES = json.loads((RECORDED / "cases.json").read_text())["cases"]
# Batches of the training network have one visual block per row.
NAMES = [case["name"] for case in CASES if len(case["media"]) == 1]


@pytest.fixture(scope="module")
def network() -> PlumeNetwork:
    built = PlumeNetwork(read_config(RECORDED / "checkpoint"))
    built.load_state_dict(load_file(RECORDED / "checkpoint" / "model.safetensors"), strict=True)
    return built.eval()


@pytest.fixture(scope="module")
def encoder(network: PlumeNetwork) -> Encoder:
    tokenizer = Tokenizer.from_file(str(RECORDED / "checkpoint" / "tokenizer.json"))
    return Encoder(tokenizer, network.config)


def side_of(encoder: Encoder, name: str, copies: int = 1) -> Side:
    """A recorded case as a batch of equal rows."""
    tensors = load_file(RECORDED / "cases.safetensors")
    kind = "video" if f"{name}.video_grid_thw" in tensors else "image"
    grids = tensors[f"{name}.{kind}_grid_thw"]
    config = encoder.config
    prefix = encoder.tokenizer.encode("<think><bot>", add_special_tokens=False).ids
    ids = torch.tensor([*tensors[f"{name}.input_ids"].flatten().tolist(), *prefix])
    grid = tuple(grids[0].tolist())
    positions = mrope_position_ids(ids, config, **{f"{kind}_grids": [grid]})
    pad = config.image_token_id if kind == "image" else config.video_token_id
    disc = int((ids == encoder.disc).nonzero()[-1])
    pixels = tensors[f"{name}.pixel_values" + ("_videos" if kind == "video" else "")]
    return Side(
        ids.expand(copies, -1),
        torch.full((copies,), len(ids)),
        torch.tensor([[disc, len(ids) - 1]]).expand(copies, -1),
        torch.as_tensor(positions),
        int((ids == pad).nonzero()[0]),
        pixels.expand(copies, -1, -1),
        grid,
    )


@pytest.mark.parametrize("steps", [8, 0])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_embeddings(
    network: PlumeNetwork, encoder: Encoder, name: str, steps: int
) -> None:
    side = side_of(encoder, name)
    with torch.no_grad():
        out = embed_side(network, encoder, side, steps)
    recorded = load_file(RECORDED / "cases.safetensors")
    variant = "disc_k8" if steps == 8 else "k0"
    assert out.gen is not None
    torch.testing.assert_close(
        F.normalize(out.gen[0], dim=-1),
        recorded[f"{name}.{variant}.embedding"].flatten(),
        atol=1e-5,
        rtol=0,
    )


def test_the_anchor_needs_nothing_behind_it(network: PlumeNetwork, encoder: Encoder) -> None:
    side = side_of(encoder, "image_square", copies=2)
    with torch.no_grad():
        alone = embed_side(network, encoder, side, None)
    recorded = load_file(RECORDED / "cases.safetensors")["image_square.disc.embedding"].flatten()
    for row in alone.disc:
        torch.testing.assert_close(F.normalize(row, dim=-1), recorded, atol=1e-5, rtol=0)
    assert alone.gen is None


def test_padding_and_batch_mates_do_not_matter(network: PlumeNetwork, encoder: Encoder) -> None:
    captions = ["seven", "a red circle left of a blue square, and some more words to be long"]
    both = encoder.texts("Find:", captions)
    assert len(set(both.lengths.tolist())) == 2
    with torch.no_grad():
        together = embed_side(network, encoder, both, 3)
        for row, caption in enumerate(captions):
            alone = embed_side(network, encoder, encoder.texts("Find:", [caption]), 3)
            assert alone.gen is not None and together.gen is not None
            torch.testing.assert_close(together.gen[row], alone.gen[0], atol=2e-5, rtol=0)


def test_gradients_reach_every_parameter(network: PlumeNetwork, encoder: Encoder) -> None:
    side = side_of(encoder, "image_square", copies=2)
    network.zero_grad()
    out = embed_side(network, encoder, side, 3)
    assert out.gen is not None
    out.gen.square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    network.zero_grad()
    # Top-2 of four experts: an expert nobody chose may legitimately stay without a gradient.
    assert not [name for name in missing if ".experts." not in name]
    assert prefill_side(network, side, True).taps.shape == (2, 1, network.config.hidden_size)
