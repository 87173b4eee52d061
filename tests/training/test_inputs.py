"""Training sees exactly what the processor makes of the same items."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.support.bundled.checkpoint import architecture, save_checkpoint
from tests.support.bundled.data import Encoder
from tests.support.bundled.evaluate import encode_entries
from tests.support.bundled.heldout import build_heldout
from tests.support.bundled.heldout_files import write_heldout
from tests.support.bundled.network import PlumeNetwork
from tests.support.bundled.tokens import train_tokenizer
from ume_models.assets import heldout
from ume_models.backbone.config import parse_config
from ume_models.embedders.plume_prompt import PROFILES
from ume_models.processing import ImageConfig, Processor

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    config = architecture(tokenizer)
    save_checkpoint(PlumeNetwork(parse_config(config)), config, tokenizer, directory)
    return directory


def test_inputs_equal_the_processors(
    tmp_path: Path, tokenizer: Tokenizer, checkpoint: Path
) -> None:
    encoder = Encoder(tokenizer, parse_config(architecture(tokenizer)))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    images = ImageConfig.from_checkpoint(checkpoint)
    profile = PROFILES["before-profiles"]
    rules = profile.rules.for_checkpoint(images)
    processor = Processor(theirs, profile.template(theirs), images, rules)
    prefix = tokenizer.encode("<think><bot>", add_special_tokens=False).ids
    drawn = build_heldout(seed=3, queries=2, candidates=2)
    write_heldout(drawn, tmp_path)
    for task, source in zip(heldout(tmp_path).tasks, drawn, strict=True):
        for items, instruction, entries in (
            (task.queries, source.task.query_instruction, source.queries),
            (task.candidates, source.task.target_instruction, source.candidates),
        ):
            side = encode_entries(encoder, instruction, entries)
            for row, planned in enumerate(processor.plan(items)):
                made = processor.load(planned)
                expected = [*made.input_ids.tolist(), *prefix]
                assert side.ids[row, : int(side.lengths[row])].tolist() == expected
                pixels, grid = made.pixel_values, made.image_grid_thw
                if made.video_grid_thw is not None:
                    pixels, grid = made.pixel_values_videos, made.video_grid_thw
                assert pixels is not None and grid is not None
                assert grid.tolist() == [list(side.grid)]
                patches = side.patches[row if len(side.patches) > 1 else 0]
                torch.testing.assert_close(patches, pixels, atol=1e-6, rtol=1e-6)
