"""``encode``: order, duplicates, batching, memory, and items that cannot be embedded."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ume_models.encode import encode_detailed, out_of_memory
from ume_models.errors import ErrorKind, ItemError


@pytest.fixture(scope="module")
def model(load_recorded):
    return load_recorded(engine="fast")


def picture(seed, width=70, height=56):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def items():
    return [
        {"text": "short"},
        {"text": "a much longer text " * 12, "id": "long"},
        {"image": picture(0)},
        {"text": "what is it?", "instruction": "Answer:", "image": picture(1, 140, 84)},
        {"text": "moves", "video": [picture(i) for i in range(5)]},
        {"text": "short"},
        {"image": picture(0)},
    ]


@pytest.mark.compat
def test_equals_the_official_loop_item_by_item(model, load_recorded, items):
    official = load_recorded(engine="reference")
    got = model.encode(items, batch_tokens=200)
    expected = torch.cat([official.encode([item]) for item in items])
    assert got.dtype == torch.float32
    assert got.shape == (7, 128)
    assert float((got - expected).abs().max()) <= 1e-5
    torch.testing.assert_close(got.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("mode", ["disc", "last"])
def test_single_pass_modes(model, load_recorded, items, mode):
    expected = load_recorded(engine="reference").encode(items, mode=mode)
    assert float((model.encode(items, mode=mode) - expected).abs().max()) <= 1e-5


def test_duplicates_go_through_the_model_once(model, items):
    output = encode_detailed(model, items)
    assert output.stats.items == 7
    assert output.stats.unique == 5
    assert torch.equal(output.embeddings[0], output.embeddings[5])
    assert torch.equal(output.embeddings[2], output.embeddings[6])
    assert output.ids == ["0", "long", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("budget", [1, 150, 10_000])
@pytest.mark.parametrize("workers", [0, 3])
def test_budget_and_workers_do_not_matter(model, items, budget, workers):
    output = encode_detailed(model, items, batch_tokens=budget, workers=workers)
    assert float((output.embeddings - model.encode(items)).abs().max()) <= 2e-6
    assert output.stats.batches == {1: 5, 10_000: 1}.get(budget, output.stats.batches)


def test_batches_are_halved_when_memory_runs_out(model, items, monkeypatch):
    expected = model.encode(items)
    embed_prepared = model.embed_prepared
    sizes = []

    def limited(batch, options):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return embed_prepared(batch, options)

    monkeypatch.setattr(model, "embed_prepared", limited)
    output = encode_detailed(model, items)
    assert sizes == [5, 2, 3, 1, 2]
    assert output.stats.splits == 2
    assert float((output.embeddings - expected).abs().max()) <= 2e-6


def test_an_item_that_never_fits_is_named(model, monkeypatch):
    def never(batch, options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(model, "embed_prepared", never)
    with pytest.raises(ItemError, match=r"item 0 \(id 'big'\): does not fit into memory"):
        model.encode([{"text": "a", "id": "big"}])


def test_other_errors_are_not_taken_for_memory(model, monkeypatch):
    def broken(batch, options):
        raise RuntimeError("shape mismatch")

    assert not out_of_memory(RuntimeError("shape mismatch"))
    monkeypatch.setattr(model, "embed_prepared", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        model.encode([{"text": "a"}])


def test_a_row_that_is_not_finite_is_isolated(model, items, monkeypatch):
    embed_prepared = model.embed_prepared

    def overflowing(batch, options):
        if any(item.id == "long" for item in batch):
            raise FloatingPointError("an embedding is not finite")
        return embed_prepared(batch, options)

    monkeypatch.setattr(model, "embed_prepared", overflowing)
    output = encode_detailed(model, items, on_error="skip")
    assert [error.id for error in output.errors] == ["long"]
    assert torch.isfinite(output.embeddings).all(dim=1).tolist() == [True, False, *[True] * 5]


def test_overflow_in_float16_is_an_error(checkpoint_dir):
    import ume_models

    model = ume_models.load(checkpoint_dir, dtype="float16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(6e4)
    model.refresh()
    with pytest.raises(ItemError, match=r"item 0.*not finite"):
        model.encode([{"text": "a"}])


def test_bad_items(model, tmp_path):
    cut = tmp_path / "cut.png"
    picture(3, 300, 300).save(cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    items = [
        {"text": "fine"},
        {"image": "missing.png", "id": "gone"},
        {"image": str(cut), "id": "cut"},
        {"text": ""},
        {"text": "fine", "colour": "red"},
        {"text": "word " * 5000, "id": "endless"},
        {"video": [], "id": "no frames"},
    ]
    output = encode_detailed(model, items, on_error="skip", base_dir=tmp_path)
    assert [error.index for error in output.errors] == [1, 2, 3, 4, 5, 6]
    assert torch.isnan(output.embeddings).all(dim=1).tolist() == [False] + [True] * 6
    said = [str(error) for error in output.errors]
    for message, expected in zip(
        said,
        ["missing.png", "cut.png", "item 3", "colour", "holds 4096", "no frames"],
        strict=True,
    ):
        assert expected in message
    for bad in items[1:]:
        with pytest.raises(ItemError):
            model.encode([items[0], bad], base_dir=tmp_path)


def test_a_long_text_leaves_the_others_alone(model):
    result = encode_detailed(
        model, [{"text": "a b " * 10**6}, {"text": "short", "id": np.int64(7)}], on_error="skip"
    )
    assert [error.kind for error in result.errors] == [ErrorKind.TOO_LONG]
    assert torch.equal(result.embeddings[1], model.encode([{"text": "short"}])[0])
    assert result.ids == ["0", "7"]


def test_rows_of_another_convention_are_refused(model, load_recorded):
    other = load_recorded(engine="fast", pictures="as_seen")
    rows = other.prepare([{"image": picture(0), "id": "x"}])
    with pytest.raises(ItemError, match="profile") as caught:
        model.embed_prepared(rows)
    assert caught.value.id == "x"
    assert caught.value.kind is ErrorKind.OTHER_SETTINGS
    assert torch.equal(other.embed_prepared(rows), model.encode([{"image": picture(0)}]))


def test_pictures_that_differ_in_their_palette_are_two_items(model):
    pair = []
    for rgb in ([200, 30, 30], [30, 30, 200]):
        image = Image.new("P", (60, 60))
        image.putpalette(rgb)
        image.putalpha(255)
        pair.append({"image": image})
    alone = torch.cat([model.encode([item]) for item in pair])
    torch.testing.assert_close(model.encode(pair), alone, atol=1e-5, rtol=0)


def test_progress_and_no_items(model, items):
    calls = []
    model.encode(items, batch_tokens=150, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert model.encode([]).shape == (0, 128)


def test_pipes_are_refused(model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ItemError, match=r"pipe.*is a pipe, socket or device"):
        model.encode([{"image": str(pipe)}])


def test_options_are_checked(model):
    with pytest.raises(TypeError, match="put a single one into a list"):
        model.encode({"text": "a"})
    with pytest.raises(ValueError, match="latent_steps"):
        model.encode([{"text": "a"}], latent_steps="x")
    with pytest.raises(ValueError, match="batch_tokens"):
        model.encode([{"text": "a"}], batch_tokens=0)
    with pytest.raises(ValueError, match="on_error"):
        model.encode([{"text": "a"}], on_error="ignore")
    assert math.isclose(
        float(model.encode([{"text": "a"}], latent_steps=0).norm()), 1, abs_tol=1e-5
    )
