"""The files that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.support.bundled.heldout import build_heldout
from tests.support.bundled.heldout_files import write_heldout
from tests.support.bundled.network import PlumeNetwork
from ume_models.assets import heldout, tiny_checkpoint
from ume_models.backbone.config import read_config
from ume_models.errors import UmeError
from ume_models.processing.items import parse_item


def test_checkpoint_has_the_official_keys_and_shapes() -> None:
    directory = tiny_checkpoint()
    expected = {
        name: list(value.shape)
        for name, value in PlumeNetwork(read_config(directory)).state_dict().items()
    }
    with safe_open(directory / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name in found:
            assert np.isfinite(file.get_tensor(name).numpy()).all(), name
    assert found == expected
    adapter = [name for name in found if name.startswith("latent_moe_transition.")]
    assert len(adapter) == 25
    prefixes = ("model.", "visual.", "latent_moe_transition.")
    assert all(name.startswith(prefixes) for name in found)


def test_checkpoint_files_agree_with_each_other() -> None:
    directory = tiny_checkpoint()
    config = json.loads((directory / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for field, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("eos_token_id", "<|im_end|>"),
    ):
        assert config[field] == tokenizer.token_to_id(token)
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((directory / name).read_text())
    template = json.loads((directory / "chat_template.json").read_text())["chat_template"]
    config_template = json.loads((directory / "tokenizer_config.json").read_text())
    assert config_template["chat_template"] == template


def test_files_are_small_enough_to_ship() -> None:
    sizes = {
        path: path.stat().st_size
        for root in (tiny_checkpoint(), Path(tiny_checkpoint()).parent / "heldout")
        for path in root.rglob("*")
        if path.is_file()
    }
    assert max(sizes.values()) < 5_000_000
    assert sum(sizes.values()) < 8_000_000


def test_held_out_items_are_valid_and_complete() -> None:
    tasks = heldout().tasks
    assert len(tasks) == 9 and len({task.name for task in tasks}) == 9
    ids = [item["id"] for task in tasks for item in (*task.queries, *task.candidates)]
    assert len(set(ids)) == len(ids)
    for task in tasks:
        assert task.instruction and len(task.queries) >= 12 and len(task.candidates) >= 40
        known = {item["id"] for item in task.candidates}
        assert len(task.relevant) == len(task.queries)
        assert all(wanted and set(wanted) <= known for wanted in task.relevant)
        for index, item in enumerate((*task.queries, *task.candidates)):
            parsed = parse_item(item, index)
            assert parsed.id == item["id"]
            for source in (*parsed.images, *(parsed.video or ())):
                assert Path(str(source)).is_absolute()
                with Image.open(str(source)) as image:
                    assert image.mode == "RGB" and all(side % 28 == 0 for side in image.size)


def test_written_items_carry_the_drawn_pictures(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    sets = build_heldout(seed=2, queries=2, candidates=3)
    write_heldout(sets, tmp_path)
    read = heldout(tmp_path).tasks
    assert [task.name for task in read] == [drawn.task.name for drawn in sets]
    for task, drawn in zip(read, sets, strict=True):
        for items, entries in ((task.queries, drawn.queries), (task.candidates, drawn.candidates)):
            for item, entry in zip(items, entries, strict=True):
                if entry.pixels is None:
                    assert item["text"] == entry.caption
                    continue
                paths = item["video"] if "video" in item else [item["image"]]
                for path, frame in zip(paths, entry.pixels, strict=True):
                    assert np.array_equal(np.asarray(Image.open(path)), frame)


def test_missing_items_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UmeError, match=r"heldout\.json.*python -m tests"):
        heldout(tmp_path)
