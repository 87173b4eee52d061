"""The command line with a real model: the recorded tiny checkpoint, embedded and searched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ume_models
from ume_models.cli import app
from ume_models.store import EmbeddingStore

RECORDED = Path(__file__).parent.parent / "conformance" / "plume_tiny"
CHECKPOINT = RECORDED / "checkpoint"
IMAGES = RECORDED / "images"


def ume(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def items(write_items: Callable[..., Path]) -> Path:
    frames = [str(IMAGES / f"video_4_0_{number}.png") for number in range(4)]
    return write_items(
        {"text": "a red square"},
        {"image": str(IMAGES / "image_square_0_0.png"), "instruction": "Represent it.", "id": "s"},
        {"image": str(IMAGES / "image_wide_0_0.png"), "id": "w"},
        {"video": frames, "id": "v"},
        {"text": "a red square", "id": "twin"},
        {"image": str(IMAGES / "none.png"), "id": "gone"},
    )


def test_stored_embeddings_are_the_models(items: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", CHECKPOINT, "--shard-size", 4, "--on-error", "skip")
    result = ume("embed", items, "-o", out, *options)
    assert result.exit_code == 3, result.output
    store = EmbeddingStore.open(out)
    assert [entry.id for entry in store.skipped()] == ["gone"]
    stored = torch.cat([shard.embeddings for shard in store.shards()])
    lines = [json.loads(line) for line in items.read_text().splitlines()][:5]
    direct = ume_models.load(CHECKPOINT).encode(lines)
    torch.testing.assert_close(stored, direct, atol=1e-5, rtol=0)
    torch.testing.assert_close(stored.norm(dim=1), torch.ones(5))

    # Every item finds itself, and equal items tie in the order of the file.
    result = ume("search", "--index", out, "--queries", write_queries(items), "--json", "-")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    best = {a["query"]["id"]: [found["id"] for found in a["results"][:2]] for a in answers}
    assert best["s"][0] == "s"
    assert best["w"][0] == "w"
    assert best["v"][0] == "v"
    assert sorted(best["twin"]) == ["1", "twin"]
    assert answers[1]["results"][0]["score"] == pytest.approx(1, abs=1e-5)


def write_queries(items: Path) -> Path:
    queries = items.with_name("queries.jsonl")
    queries.write_text("".join(items.read_text().splitlines(keepends=True)[:5]))
    return queries


def test_several_images_need_a_choice(write_items: Callable[..., Path], tmp_path: Path) -> None:
    images = [str(IMAGES / f"two_images_{number}_0.png") for number in range(2)]
    items = write_items({"images": images})
    result = ume("embed", items, "-o", tmp_path / "a", "--model", CHECKPOINT)
    assert result.exit_code == 1
    assert "--multi-image all|first" in result.stderr
    for choice in ("all", "first"):
        options = ("--model", CHECKPOINT, "--multi-image", choice)
        assert ume("embed", items, "-o", tmp_path / choice, *options).exit_code == 0
    stored = [
        next(EmbeddingStore.open(tmp_path / choice).shards()).embeddings
        for choice in ("all", "first")
    ]
    assert not torch.allclose(*stored, atol=1e-3)


def test_a_checkpoint_that_is_not_one(items: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        result = ume("embed", items, "-o", tmp_path / "out", "--model", place)
        assert result.exit_code == 1
        assert str(place) in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_options_of_a_family_are_given_by_name(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"instruction": "Find it.", "text": "a dog"}\n{"text": "a cat"}\n')
    checkpoint = RECORDED.parent / "family_seen" / "checkpoint"
    out = tmp_path / "index"
    family = ("--model", checkpoint, "--family", "trace", "--option", "max_new_tokens=5")
    assert ume("embed", items, "-o", out, *family, "--pictures", "as_seen").exit_code == 0
    settings = json.loads((out / "manifest.json").read_text())["encoding"]
    assert settings["max_new_tokens"] == 5
    assert settings["images"]["pictures"] == "as_seen"
    assert ume("search", "--index", out, "a dog", "--json", "-").exit_code == 0
    assert ume("embed", items, "-o", tmp_path / "b", "--option", "steps").exit_code == 2
    unknown = ume("embed", items, "-o", tmp_path / "b", "--option", "steps=3")
    assert (unknown.exit_code, "steps" in unknown.output) == (1, True)
